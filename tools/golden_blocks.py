#!/usr/bin/env python3
"""Golden values of block formats: random blocks, and what the gguf package makes of them.

    tools/golden_blocks.py     writes tests/golden/blocks.json

Needs numpy and gguf; `make test` never runs it.
"""

import json
import pathlib

import gguf
import numpy as np

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "blocks.json"
ROWS = 2
# Where a block's f16 numbers are: random bits there would often be no numbers.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def main():
    random = np.random.default_rng(1)
    golden = {"about": "bytes in hexadecimal, a string a block, and their elements",
              "made_by": "tools/golden_blocks.py"}
    for name, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ROWS, size), dtype=np.uint8)
        for at in halves:
            numbers = random.uniform(-1, 1, ROWS).astype(np.float16)
            blocks[:, at:at + 2] = numbers.view(np.uint8).reshape(ROWS, 2)
        values = gguf.quants.dequantize(blocks, kind)
        golden[name] = [{"bytes": block.tobytes().hex(), "values": [float(x) for x in row]}
                        for block, row in zip(blocks, values)]
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in golden.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{OUT.name}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
