#!/usr/bin/env bash
# Prints what ptxas says of each kernel: tools/kernels.sh FILE.ptxas... Fails if any spills.
set -euo pipefail
sed -E 's/^ptxas info +: //' "$@" | c++filt | awk '
  /^Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4] }
  /bytes spill stores/ { spills = $5 + $9 }
  /^Used [0-9]+ registers/ {
    shared = 0
    for (i = 2; i <= NF; ++i) if ($i ~ /^smem/) shared = $(i - 2 + 0)
    match($0, /[0-9]+ bytes smem/); if (RSTART) shared = substr($0, RSTART) + 0
    printf "%-6s %3d registers %6d bytes shared %4d bytes spilled  %s\n", arch, $2, shared, spills, name
    if (spills > 0) ++bad
  }
  END { if (bad > 0) { printf "%d kernels spill\n", bad; exit 1 } }'
