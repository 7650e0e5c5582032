#!/usr/bin/env bash
# Runs every ```sh block of the README and the docs with the given binary as build/thaw, from the root
# of the repository. A block must exit with 0; when an ```output block follows, it must print that.
# Blocks that begin with "make", "git" or "tools/" install or build, and are left out.
set -uo pipefail
thaw=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One file a block in $work: 01.sh, 01.output, 02.sh, ...
awk -v dir="$work" '
  /^```/ && fence { fence = ""; next }
  /^```sh$/ { fence = file = sprintf("%s/%03d.sh", dir, ++n); next }
  /^```output$/ { fence = file = sprintf("%s/%03d.output", dir, n); next }
  /^```/ { fence = "other"; file = ""; next }
  fence && file { print >file }
' README.md docs/*.md weights/README.md

passed=0 failed=0
for block in "$work"/*.sh; do
  head -n 1 "$block" | grep -qE '^(make|git|tools/)' && continue
  sed -i "s#/tmp/#$work/#g; s#build/thaw#$thaw#g" "$block"
  expected=${block%.sh}.output
  if ! bash -euo pipefail "$block" >"$work/stdout" 2>"$work/stderr"; then
    reason=$(tail -n 3 "$work/stderr")
  elif [ -e "$expected" ] && ! diff "$expected" "$work/stdout" >"$work/diff"; then
    reason="the output differs:"$'\n'$(cat "$work/diff")
  else
    passed=$((passed + 1))
    continue
  fi
  failed=$((failed + 1))
  printf 'readme: failed: %s\n%s\n' "$(cat "$block")" "$reason"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
