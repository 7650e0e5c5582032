#!/usr/bin/env bash
# Runs thaw as a whole with the GPU's code on the emulator: what the command line makes of backends,
# with a real model. tools/gpu_check.sh --emulated compares the backends.
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
first=${cpu%% place*}
expect "thaw, with a store that checks itself" 0 "$first" "run      cuda" -n 1 -v --backend cuda \
  --check-kv --freeze-from 0
expect "a context too short to freeze" 0 "$first" "freezing begins at 65536 tokens" -n 1 \
  --backend cuda --check-kv
expect "auto takes the device, which samples" 0 "$cpu" "backend  cuda: " -n 3
expect "auto takes the cpu for what the device lacks" 0 "$cpu" \
  "backend  cpu: --cold-file runs on the CPU only" -n 3 --cold-file "$work/cold"
expect "recovery, checked" 0 "$first" "recovery" -n 1 --backend checked --recovery rewalk \
  --freeze-from 0
expect "what the device lacks" 1 "" "--cold-file: runs on the CPU only; expected --backend cpu" \
  --backend cuda --cold-file "$work/cold"
expect "a freeze map and a trace of every step" 0 "$cpu" "" -n 3 --backend cuda \
  --report "$work/map.html" --trace "$work/trace.json" --freeze-from 0
if [ "$(grep -c '"name":"decode"' "$work/trace.json")" = 2 ] && [ -s "$work/map.html" ] &&
  [ "$(grep -c '"name":"seed"' "$work/trace.json")" = 30 ]; then
  passed=$((passed + 1))
else
  failed=$((failed + 1)) && echo "emulated: failed: the trace lacks a step, or what a layer seeded"
fi

# A conversation that the GPU's store held goes on from a file, there and on the CPU.
chat() {
  "$thaw" chat -m "$model" --system "" --temp 0 -n 1 --history "" -q "$@" 2>/dev/null
}
hi=$(printf 'Hi\nAnd?\n' | chat --backend cpu --policy full)
for policy in full thaw "thaw --freeze-from 0"; do
  rm -f "$work/talk"
  said=$(echo Hi | chat --backend cuda --policy $policy --session "$work/talk")
  for backend in cuda cpu; do
    cp "$work/talk" "$work/talk-$backend"
    more=$(echo "And?" | chat --backend $backend --policy $policy --session "$work/talk-$backend")
    if [ "$said"$'\n'"$more" = "$hi" ]; then
      passed=$((passed + 1))
    else
      failed=$((failed + 1))
      printf 'emulated: failed: chat, %s, then %s: %s\n' $policy $backend "$said, $more"
    fi
  done
done

# What bench says that a token reads is what kernels read: the difference between 12 decoded tokens
# and 4, in each of two runs, so that the prompt does not count.
traffic() {
  SIMT_COUNTS=$work/counts-$2 "$thaw" bench --random tiny --weights bf16 --backend cuda -p 0 -d 900 \
    -r 1 -q --json --policy $1 -n "$2" >"$work/bench-$2"
}
for policy in full thaw "thaw --freeze-from 0"; do
  if traffic "$policy" 4 && traffic "$policy" 12 && python3 tests/traffic.py "$work" 4 12; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1)) && echo "emulated: failed: bytes that a token reads, --policy $policy"
  fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
