#!/usr/bin/env bash
# Plants one bug at a time into a copy of the store, its attention and what writes with them, and
# expects their tests to fail. Ends with "N passed, N failed"; a bug that survives has failed.
set -uo pipefail
cd "$(dirname "$0")/.."

# file | sed expression | what it breaks
mutants=$(grep -vE '^(#|$)' <<'END'
# 1: every token is in the cold tier, bit-exact
kvstore/tiers.cpp|s/to.value_offset, v + head/to.value_offset, k + head/|a value in the cold tier
kvstore/lane.cpp|s/cold.value(first_head_ + head, token)/cold.key(first_head_ + head, token)/|a hot copy
# 2: a token is hot or frozen, never neither
kvstore/residency.cpp|s/if (!thaw(now, token, KvEvent::kThaw, 0)) sleep(token, 1);/thaw(now, token, KvEvent::kThaw, 0);/|asr forgets who found no room
kvstore/residency.cpp|s/if (params_.policy == Policy::kAsr) sleep(token, 1);//|asr forgets who had to leave
# 3: rows, mask and free pages fit each other
kvstore/lane.cpp|s/^  mask_.*&= .*$//|the mask of hot tokens
kvstore/lane.cpp|s/^    arena_.give(pages_.back());$//|a page is lost
# 4: a step has its order, and what it reads stays
kvstore/step_order.cpp|s/return layer.is_unsettled;/return false;/|a step before the last one is settled
kvstore/step_order.cpp|s/tokens(layer) == first_/true/|a second append of a layer
kvstore/step_order.cpp|s/^  n_tokens_ = 0;$//|a step outlives a rewind
kvstore/lane.cpp|s/row_key(last, head), 2 \* kv_row_/row_key(last, head), kv_row_/|the value of a moved row
kvstore/residency.cpp|s/token >= first_recent(now)/token > first_recent(now)/|the window
# 5: timers and counters
kvstore/residency.cpp|s/if (--s.timer == 0) waking/if (s.timer-- == 0) waking/|a sleep is a step too long
kvstore/policy.h|s/p.stay \* std::sqrt(static_cast<float>(hits))/p.stay * static_cast<float>(hits)/|stays without the root
# 6: no more hot bytes than promised
kvstore/residency.cpp|s/if (lane_.n_rows() >= now.bound || /if (/|the bound of a lane
kvstore/lane.cpp|s/max_pages_ - pages_)/max_pages_)/|the promise in bytes
kvstore/tiered_store.cpp|s/bounds_.share(kv_len + 1);//|budgets
kvstore/tiered_store.cpp|s/pages += lane.clear_for_seed(moment(layer, kv_len));/static_cast<void>(lane);/|who is not chosen stays
# 7: the same seed, the same history
kvstore/residency.cpp|s/if (position == 0) entropy_ = ghost_mass_ = tau_ = 0;//|clear keeps a threshold
# ghosts
kvstore/ghost_code.h|s/xc > 0 ? squares \/ xc/xc > 0 ? 0.9f * squares \/ xc/|the unbiased gain
kvstore/ghost_sums_cpu.h|s/kBits == 4 ? 2 : 4;/8;/|16-bit sums
kvstore/tiers.cpp|s/    n += first;$//|ghosts of the first tokens
kvstore/tiers.cpp|s/    if (!value) rope_.turn_back.*$//|a centre that does not turn with RoPE
kvstore/tiers.cpp|s/if (is_whole && carried_to_.*== first)/if (is_whole)/|a carry outlives a rewind
kvstore/ghost.cpp|s/fmaf(kFeedback, carry\[j\], x\[j\])/x[j]/|values that make up for nothing
kvstore/ghost_rope.cpp|s/c\[3\] -= b/c[3] += b/|the cubic of slow pairs
kvstore/ghost_rope.cpp|s/= even\[j\] - odd/= even[j] + odd/|places before the middle
# policies
kvstore/residency.cpp|s/stats.probability\[t\], n_rows)/stats.probability[t], 1)/|h2o counts a prompt once
# recovery
kvstore/policy.h|s/stamp > step - kWakeSteps/stamp > step - 2 * kWakeSteps/|old freezes are recent
kvstore/residency.cpp|s/t = now.kv_len; t-- > 0;/t = 0; t < now.kv_len; ++t/|the oldest wake first
model/generate.cpp|s/if (token == known_token(i)) {/if (true) {/|a draft that full would not write
# attention over tiers
attention/tiered_cpu.cpp|s/? lane.hot_mask\[word\] : 0/? 0 : 0/|hot tokens answer twice
attention/tiered_cpu.cpp|s/^      e\[t\] = 0;$//|recalled tokens answer twice
kvstore/policy.h|s/if (!(doubt > 0)) return 1;/return 1;/|sharp heads are believed
attention/tiered_cpu.cpp|s/rotated\[i\] += ghosts.l \* mean/rotated[i] += mean/|the mean of values
# short contexts
kvstore/tiered_store.cpp|s/cold_.rows(layer, kv_len), 0, kv_len);/cold_.rows(layer, kv_len), 0, kv_len - 1);/|a token of a short context has no ghost
kvstore/tiered_store.cpp|s/lane.cut(moment(layer, 0), 0);/static_cast<void>(lane);/|a context that wakes up keeps its rows
kvstore/tiered_store.cpp|s/freezes_at(order_.end() + 1)/freezes_at(order_.end())/|nobody asks whom the last whole step attended
kvstore/bounds.cpp|s/return promised_at_most(options_.freeze_from);/return options_.freeze_from;/|a short context over the promise
# faults
kvstore/tiered_store.cpp|s/  arena_->reserve(pages);//|memory for the first decode step
kvstore/pages.cpp|s/ | O_EXCL//|a cold file over a user's
END
)

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/tests" "$copy/model" "$copy/tokenizer"
cp -r Makefile device kvstore attention "$copy"
cp model/*.h model/{backend_cpu,config,forward,generate,matmul,ops_cpu,sampler,tensor}.cpp "$copy/model"
cp tokenizer/*.h "$copy/tokenizer"
cp tests/*.h tests/main.cpp tests/tiny_files.cpp "$copy/tests"
cp tests/test_{ghost,ghost_rope,freeze_from,policy,reset,tiered_attention,kv_properties,kv_replay,kv_faults,verify}.cpp "$copy/tests"

# 0: the tests pass, 1: they fail, 2: they do not compile.
run_tests() {
  make -C "$copy" OPT=-O1 WARN= ARCH="${ARCH:-native}" build/thaw-tests >"$copy/log" 2>&1 || return 2
  timeout 120 "$copy/build/thaw-tests" -aa=1 >"$copy/log" 2>&1 || return 1
}

run_tests || { cat "$copy/log"; echo "mutants: the tests fail without a bug"; exit 1; }
killed=0 survived=0
while IFS= read -r mutant; do
  file=${mutant%%|*} what=${mutant##*|} expression=${mutant#*|}
  sed -i "${expression%|*}" "$copy/$file"
  if cmp -s "$file" "$copy/$file"; then
    echo "mutants: $file: nothing to change for: $what" && survived=$((survived + 1))
    continue
  fi
  run_tests </dev/null  # the list is on stdin
  case $? in
    1) killed=$((killed + 1)) ;;
    0) echo "mutants: $file: survived: $what" && survived=$((survived + 1)) ;;
    *) cat "$copy/log" && echo "mutants: $file: does not compile: $what" && survived=$((survived + 1)) ;;
  esac
  cp "$file" "$copy/$file"
done <<<"$mutants"
echo "$killed passed, $survived failed"
[ "$survived" -eq 0 ]
