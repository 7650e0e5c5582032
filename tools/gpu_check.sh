#!/usr/bin/env bash
# Tests and measures thaw on this machine's GPU in one go, in some 8 minutes on a data-centre card.
#
#   tools/gpu_check.sh [DIR]               tests, sanitizers, a real model, then speed; keeps
#                                          DIR/gpu-results.md and .json up to date; default DIR: docs
#   tools/gpu_check.sh --emulated [DIR]    the same steps on the emulator, with tiny sizes, so that
#                                          this script is known to work; default DIR: build
#
# FORMATS, DEPTHS and PROMPTS in the environment replace what is measured: "bf16 q8_0 q4_0",
# 512,8192,32768 and 512,4096; the last format also gets LONG_DEPTHS and LONG_PROMPTS, which take
# longest: 131072 and 32768.
#
# build/thaw-cuda and build/thaw-cuda-tests are used as they are where they stand, and built where
# they do not. Exits with 1 when something is wrong, and says what; a step that needs what this
# machine lacks (compute-sanitizer, weights, torch) is left out, and the results say so.
set -uo pipefail
cd "$(dirname "$0")/.."

emulated=false
if [ "${1:-}" = --emulated ]; then emulated=true && shift; fi
case ${1:-} in -*) echo "gpu_check: expected --emulated or a folder, found '$1'" >&2; exit 2 ;; esac
if $emulated; then
  out=${1:-build} thaw=build/thaw-emulated tests="build/thaw-simt-tests -tc=*attention:*refused*"
  shape=tiny formats="f16 q8_0" depths=4 prompts=9 long_depths=40 long_prompts=20
  tokens=2 repetitions=1 answer=1
else
  out=${1:-docs} thaw=build/thaw-cuda tests=build/thaw-cuda-tests
  shape=8b formats=${FORMATS:-bf16 q8_0 q4_0} depths=${DEPTHS:-512,8192,32768}
  prompts=${PROMPTS:-512,4096} long_depths=${LONG_DEPTHS:-131072} long_prompts=${LONG_PROMPTS:-32768}
  tokens=32 repetitions=5 answer=48
fi
model=weights/SmolLM2-135M-Instruct.Q4_1.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
failed=0
limited="timeout -k 5 120"  # a step that takes longer has failed; the others still have their turn
facts=emulator
$emulated || facts=$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,compute_cap \
  --format=csv,noheader 2>/dev/null | head -n 1)
results() { python3 tools/gpu_results.py "$work" "$out" "$facts"; }

# step NAME COMMAND..: runs it; its end is shown only when it fails. One line a step in steps.txt.
step() {
  local name=$1 start=$SECONDS result=passed
  shift
  printf 'gpu_check: %s ... ' "$name"
  if ! "$@" >"$work/log" 2>&1; then
    result=failed failed=$((failed + 1))
    echo
    tail -n 30 "$work/log"
  fi
  echo "$result, $((SECONDS - start)) s"
  printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - start))" >>"$work/steps.txt"
}
leave_out() {
  echo "gpu_check: $1: left out: $2"
  printf '%s\tleft out: %s\t0\n' "$1" "$2" >>"$work/steps.txt"
}

build() {
  [ -x "$thaw" ] && [ -x "${tests%% *}" ] || make "$thaw" "${tests%% *}"
}

# On a device every case is a process of its own: what one breaks there, no other sees.
run_tests() {
  if $emulated; then $tests; else CASE_SECONDS=30 $limited python3 tests/cases.py "$tests"; fi
}

# A short run of everything that decoding and prompts launch: whole contexts, then frozen ones.
small_run() {
  for weights in q4_0 q6_k; do
    "$@" "$thaw" bench --random tiny --weights $weights --backend cuda -p 20 -n 4 -r 1 -d 150 \
      --policy full,thaw --freeze-from 152 || return
  done
}
sanitized_tests() { $limited compute-sanitizer --tool "$1" --error-exitcode 1 "$tests" -tc="$2"; }
# initcheck sees only what kernels of our own store, so it gets what needs no cuBLASLt. Tests copy
# whole buffers to the host and look at what is there: that is no error, a kernel that reads is.
no_uninitialized_reads() {
  $limited compute-sanitizer --tool initcheck --show-backtrace no --print-limit 1000000 \
    --log-file "$work/initcheck" "$tests" \
    -tc="cuda attention*,cuda tiered*,cuda tiers*,cuda residency*,cuda lanes*" || return
  grep -q 'ERROR SUMMARY' "$work/initcheck" && ! grep -m 5 -A 3 'Uninitialized __' "$work/initcheck"
}

# The real model writes on the GPU what it writes on the CPU, under a policy and its flags.
same_answer() {
  local run=("$thaw" generate -m "$model" -p "Paris is" --temp 0 -n "$answer" -q --policy $1)
  diff <($limited "${run[@]}" --backend cpu) <($limited "${run[@]}" --backend cuda)
}
checked_ops() {
  $limited "$thaw" generate -m "$model" -p "Paris is" --temp 0 -n 1 -q --policy full --backend checked
}

# measure NAME FLAGS..: a bench's JSON under that name, and the tables with it: whoever lent the
# machine may take it back at any time.
measure() {
  local name=$1
  shift
  $limited "$thaw" bench --random "$shape" --backend cuda -r "$repetitions" -q --json "$@" \
    >"$work/$name.json" && results
}
ops() {
  step "ops, $shape $1" measure "ops-$1" --weights "$1" -n 4 -d "${depths%%,*}" --policy full,thaw \
    --freeze-from 0 --op embed,qkv,append,attend,settle,project_add,gate_up,logits
}

step "build" build
step "tests on the device" run_tests
if ! $emulated && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "compute-sanitizer $tool" small_run $limited \
      compute-sanitizer --tool "$tool" --error-exitcode 1
  done
  step "compute-sanitizer memcheck, tests" sanitized_tests memcheck "cuda sampler*,cuda ops*,cuda gemm*"
  step "compute-sanitizer racecheck, tests" sanitized_tests racecheck "cuda sampler*"
else
  leave_out "compute-sanitizer" "$($emulated && echo "there is no device" || echo "not in PATH")"
  step "a short run" small_run
fi
if [ -e "$model" ]; then
  step "SmolLM2: each op as on the CPU" checked_ops
  for policy in full thaw "thaw --freeze-from 0"; do
    step "SmolLM2: --policy $policy as on the CPU" same_answer "$policy"
  done
else
  leave_out "SmolLM2" "no weights (make weights)"
fi
for format in $formats; do
  [ "$format" != "${formats##* }" ] || depths=$depths,$long_depths prompts=$prompts,$long_prompts
  step "decode, $shape $format" measure "decode-$format" --weights "$format" -p 0 -n "$tokens" \
    -d "$depths" --policy full,thaw --freeze-from 0
  step "prompts, $shape $format" measure "prompt-$format" --weights "$format" -p "$prompts" -n 0 \
    --policy full,thaw --freeze-from 0
done
step "decode by default, $shape $format" measure "default-$format" --weights "$format" -p 0 \
  -n "$tokens" -d "${depths%,*}" --policy full,thaw
ops "${formats##* }"
$emulated || [ "${formats%% *}" = "${formats##* }" ] || ops "${formats%% *}"
if ! $emulated && command -v compute-sanitizer >/dev/null; then
  step "compute-sanitizer initcheck" no_uninitialized_reads
fi
if $emulated; then
  leave_out "transformers" "there is no device"
elif python3 -c 'import torch, transformers; assert torch.cuda.is_available()' 2>/dev/null; then
  results  # the last step takes longest, and may be cut off
  step "transformers, $shape bf16" bash -c "$limited python3 tools/gpu_peer.py >'$work/peer.json'"
else
  leave_out "transformers" "no torch with CUDA"
fi
step "write $out/gpu-results.md" results
[ "$failed" -eq 0 ] || echo "gpu_check: failed steps: $failed"
[ "$failed" -eq 0 ]
