#!/usr/bin/env bash
# Runs each argument as a command and ends with one line, "N passed, N failed", the sum over all.
#
#   tests/tally.sh [--together] COMMAND...    --together: all at once, shown in this order
#
# A command's own count (that line, or doctest's summary) is taken; one that prints none counts as one
# case by its exit status. The end of what a failed command printed comes once more before that line.
set -uo pipefail
export THAW_REQUIRE_WEIGHTS=1  # a test whose weights are missing fails instead of being left out

together=false
if [ "$1" = --together ]; then together=true && shift; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pids=()
for command in "$@"; do
  $together || break
  # Ctrl-C ends background jobs only if they ask for it.
  (trap - INT && exec bash -c "$command") >"$work/${#pids[@]}" 2>&1 &
  pids+=($!)
done
passed=0 failed=0 failures= n=0
for command in "$@"; do
  echo "== $command"
  output=$work/$n
  if $together; then
    wait "${pids[n]}"
    status=$?
    cat "$output"
  else
    bash -c "$command" 2>&1 | tee "$output"
    status=${PIPESTATUS[0]}
  fi
  n=$((n + 1))
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
