#!/usr/bin/env python3
"""How far two files of logits are from each other: KL(A || B) in nats, and the same best token.

    build/thaw logits -m ONE -f TEXT -o a.npy && build/thaw logits -m OTHER -f TEXT -o b.npy
    tools/kl.py a.npy b.npy

Needs numpy.
"""
import sys

import numpy as np


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    a, b = (np.load(path, mmap_mode="r") for path in sys.argv[1:])
    if a.shape != b.shape:
        raise SystemExit(f"kl: shapes: expected the same, found {a.shape} and {b.shape}")
    kl, same = [], 0
    for first in range(0, len(a), 256):  # rows at a time: a vocabulary is long
        p, q = log_softmax(a[first:first + 256]), log_softmax(b[first:first + 256])
        kl += list((np.exp(p) * (p - q)).sum(axis=1))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    print(f"KL mean {np.mean(kl):.2g}, 99 % {np.quantile(kl, 0.99):.2g}, max {max(kl):.2g}; "
          f"same top-1 {100 * same / len(kl):.2f} % of {len(kl)}")


if __name__ == "__main__":
    main()
