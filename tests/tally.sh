#!/usr/bin/env bash
# Runs each argument as a command and ends with one line, "N passed, N failed", the sum over all.
# A command's own count (that line, or doctest's summary) is taken; one that prints none counts as one
# case by its exit status. The end of what a failed command printed comes once more before that line.
set -uo pipefail
export THAW_REQUIRE_WEIGHTS=1  # a test whose weights are missing fails instead of being left out

output=$(mktemp)
trap 'rm -f "$output"' EXIT
passed=0 failed=0 failures=
for command in "$@"; do
  echo "== $command"
  bash -c "$command" 2>&1 | tee "$output"
  status=${PIPESTATUS[0]}
  count=$(sed 's/\x1b\[[0-9;]*m//g' "$output" | sed -nE \
    -e 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' \
    -e 's/^\[doctest\] test cases: *[0-9]+ *\| *([0-9]+) passed *\| *([0-9]+) failed.*/\1 \2/p' |
    tail -n 1)
  case "$status,$count" in
    0,) count="1 0" ;;
    *,) count="0 1" ;;
    0,*) ;;
    *' 0') count="${count% 0} 1" ;;  # counted no failure, yet failed: it crashed at the end
  esac
  passed=$((passed + ${count% *}))
  failed=$((failed + ${count#* }))
  [ "${count#* }" -eq 0 ] || failures+="== failed: $command"$'\n'"$(tail -n 30 "$output")"$'\n'
done
printf %s "$failures"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
