#!/usr/bin/env bash
# What ptxas says of each kernel, a line each: tools/kernels.sh FILE.ptxas... Fails if any spills.
set -euo pipefail
cat "$@" | c++filt | awk -F"'" '
  /Compiling entry function/ { name = $2; arch = $4 }
  /bytes spill stores/ { split($0, n, " "); spilled = n[5] + n[9] }
  /Used [0-9]+ registers/ {
    registers = $0; sub(/.*Used /, "", registers)
    shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART) + 0 : 0
    printf "%s %4d registers %6d B shared %4d B spilled  %s\n", arch, registers, shared, spilled, name
    if (spilled > 0) ++n_bad
  }
  END { if (n_bad > 0) { print n_bad " spill"; exit 1 } }'
