#!/usr/bin/env bash
# Runs thaw as a whole with the GPU's code on the emulator: a real model, from the command line.
#
#   tests/emulated.sh build/thaw-emulated
set -uo pipefail
thaw=$1
model=weights/SmolLM2-135M-Instruct.Q4_1.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

# expect NAME STATUS OUTPUT ERROR FLAGS..: exit status, whole output, a part of standard error.
expect() {
  local name=$1 status=$2 output=$3 error=$4
  shift 4
  "$thaw" generate -m "$model" -p "Paris is" --temp 0 "$@" >"$work/stdout" 2>"$work/stderr"
  local found=$?
  if [ "$found" = "$status" ] && [ "$(cat "$work/stdout")" = "$output" ] &&
    grep -qF -e "$error" "$work/stderr"; then
    passed=$((passed + 1))
    return
  fi
  failed=$((failed + 1))
  printf 'emulated: failed: %s: exit %s\n' "$name" "$found"
  cat "$work/stdout" "$work/stderr"
}

cpu=$("$thaw" generate -m "$model" -p "Paris is" --temp 0 -n 3 -q --backend cpu --policy full)
expect "cuda writes what the cpu writes" 0 "$cpu" "run      cuda" -n 3 -v --backend cuda --check-kv
expect "checked finds nothing" 0 "${cpu%% place*}" "run      checked" -n 1 -v --backend checked
expect "auto keeps the default policy on the cpu" 0 "$cpu" "backend  cpu: --policy thaw" -n 3
expect "auto takes the device" 0 "${cpu%% place*}" "backend  cuda: " -n 1 --policy full
expect "a policy that runs on the cpu" 1 "" "--policy thaw: runs on the CPU backend only" \
  --backend cuda --policy thaw
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
