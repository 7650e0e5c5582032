#!/usr/bin/env python3
"""Compares what `thaw bench` says that decoding reads with what the emulator counted.

    tests/traffic.py FOLDER FEW MANY

FOLDER holds bench-N and counts-N of runs that decode N tokens twice: the JSON of bench, and the file
that SIMT_COUNTS named. Exits with 1 when their differences are more than 1 % apart.
"""
import json
import pathlib
import sys


def said(folder, n):
    row = json.loads((folder / f"bench-{n}").read_text())["results"][0]
    return 2 * n * row["gb_s"] * 1e9 / row["tok_s"]


def counted(folder, n):
    rows = [line.split("\t") for line in (folder / f"counts-{n}").read_text().splitlines()]
    return sum(int(size) for name, _, size in rows if not name.startswith(("copy", "fill")))


def main(folder, few, many):
    model = said(folder, many) - said(folder, few)
    found = counted(folder, many) - counted(folder, few)
    print(f"traffic: said {model:.0f} bytes, counted {found}: {100 * (found / model - 1):+.2f} %")
    return abs(found / model - 1) > 0.01


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
