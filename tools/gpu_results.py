#!/usr/bin/env python3
"""What tools/gpu_check.sh found, as tables: gpu_results.py FOLDER OUT FACTS.

FOLDER holds steps.txt (name, result, seconds) and the JSON of the measurements that were made;
FACTS is one line of nvidia-smi: name, driver, memory, clock, compute capability. Writes
OUT/gpu-results.md and OUT/gpu-results.json.
"""
import json
import pathlib
import re
import sys

# Dense f16 operations of one multiprocessor and clock, by compute capability (CUDA C++ Programming
# Guide and NVIDIA's architecture papers): what "% of tensor peak" is of.
TENSOR_OPS = {"8.0": 2048, "8.6": 1024, "8.9": 1024, "9.0": 4096, "10.0": 8192, "12.0": 2048}
# Of the 8B shape: operations of a prompt's token in the layers' matrices (the output meets only the
# last token), and of attention for each token before it.
MATRIX_OPS, ATTENTION_OPS = 2 * 6.98e9, 4 * 4096 * 32


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


def number(x, digits=1):
    return "-" if x is None else f"{x:.{digits}f}"


def decode_table(measured, peer, prefix="decode-"):
    rows = []
    for name, data in measured.items():
        if not name.startswith(prefix):
            continue
        at = {(r["test"], r["policy"]): r for r in data["results"]}
        for test in dict.fromkeys(r["test"] for r in data["results"]):
            full, thaw = at[test, "full"], at[test, "thaw"]
            depth = int((re.search(r"@d(\d+)", test) or [0, 0])[1])
            other = peer.get(str(depth)) if name == "decode-bf16" else None
            rows.append([name.removeprefix(prefix), f"{depth:,}", number(full["tok_s"]),
                         number(full["pct_peak"]), number(thaw["tok_s"]), number(thaw["pct_peak"]),
                         number(thaw["tok_s"] / full["tok_s"], 2),
                         number(other and full["tok_s"] / other, 2)])
    return table(["weights", "context", "full, tok/s", "% of peak", "thaw, tok/s", "% of peak",
                  "thaw / full", "full / transformers"], rows)


def prompt_table(measured, peak_tflops):
    rows = []
    for name, data in measured.items():
        if not name.startswith("prompt-"):
            continue
        for r in data["results"]:
            ops = MATRIX_OPS + ATTENTION_OPS * int(r["test"].removeprefix("pp")) / 2
            tflops = ops * r["tok_s"] / 1e12 if "8b" in data["model"] else None
            share = 100 * tflops / peak_tflops if tflops and peak_tflops else None
            rows.append([name.removeprefix("prompt-"), r["test"].removeprefix("pp"),
                         r["policy"], number(r["tok_s"]), number(tflops), number(share)])
    return table(["weights", "tokens", "policy", "tok/s", "TFLOP/s", "% of that"], rows)


def op_table(data):
    return table(["op", "policy", "mean us", "median us", "GB/s", "% of peak"],
                 [[r["op"], r["policy"], number(r["mean_us"]), number(r["median_us"]),
                   number(r["gb_s"]), number(r["pct_peak"])] for r in data["ops"]])


def tensor_peak(facts, n_multiprocessors):
    parts = [part.strip() for part in facts.split(",")]
    if len(parts) != 5 or parts[4] not in TENSOR_OPS or not n_multiprocessors:
        return None
    return TENSOR_OPS[parts[4]] * n_multiprocessors * float(parts[3].split()[0]) * 1e6 / 1e12


def main(folder, out, facts):
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    steps = [line.split("\t") for line in (folder / "steps.txt").read_text().splitlines()]
    measured = {}
    for path in sorted(folder.glob("*.json")):
        text = path.read_text()
        if text.strip():
            measured[path.stem] = json.loads(text)
    peer = measured.get("peer", {})
    peer_speeds = peer.get("decode_tok_s", {})
    multiprocessors = {"H100": 132, "H200": 132, "A100": 108}
    n = next((n for name, n in multiprocessors.items() if name in facts), None)
    peaks = [d[key] for d in measured.values() for key in ("read_gb_s", "peak_gb_s") if key in d]
    text = "# Measured on a GPU\n\n"
    if facts == "emulator":
        text = "# A rehearsal on the emulator\n\nIts figures mean nothing.\n\n"
    text += f"By `tools/gpu_check.sh` on: {facts}.\n\n"
    if peaks:
        text += f"Peak, a copy within device memory, bytes read and written: {max(peaks):.0f} GB/s.\n\n"
    text += table(["step", "result", "seconds"], steps)
    text += "\n## Decode\n\nSeeded random weights in the shape of LLaMA 8B; attention is as flat as they make it, so "
    text += "`thaw` recalls less than with real ones. It freezes at once here (`--freeze-from 0`).\n\n"
    text += decode_table(measured, peer_speeds)
    text += "\n## Decode by default\n\n`thaw` keeps short contexts exact, whole, as `full` does.\n\n"
    text += decode_table(measured, {}, "default-")
    rate = peer.get("product_tflops") or tensor_peak(facts, n)
    text += "\n## Prompts\n\n"
    if rate:
        text += ("A large bf16 product in PyTorch, measured in the same run"
                 if "product_tflops" in peer else "The tensor cores' peak by their clock")
        text += f": {rate:.0f} TFLOP/s.\n\n"
    text += prompt_table(measured, rate)
    for name, data in measured.items():
        if name.startswith("ops-"):
            text += f"\n## Ops, {name.removeprefix('ops-')}\n\nEach alone, from cold caches.\n\n" + op_table(data)
    (out / "gpu-results.md").write_text(text)
    (out / "gpu-results.json").write_text(
        json.dumps({"facts": facts, "steps": steps, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: gpu_results.py FOLDER OUT FACTS")
    main(*sys.argv[1:])
