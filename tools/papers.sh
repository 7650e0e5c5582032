#!/usr/bin/env bash
# Repeats what two papers measured, on a model of one's own, for their policies and for thaw:
#
#   tools/papers.sh asr [MODEL.gguf]      Adaptive Soft Rolling KV Freeze with Entropy-Guided
#                                         Recovery (arXiv 2512.11221): 500 tokens written freely,
#                                         and passkeys in 1,500 tokens
#   tools/papers.sh budget [MODEL.gguf]   Entropy-Guided KV Caching (Mathematics 13(15) 2366):
#                                         budgets by layer entropy, quality, decoding time
#
# Each prints a markdown table. The papers' figures come from larger models (LLaMA-3 8B; Qwen3 4B
# and Mistral 7B) and from their abstracts; ours from MODEL, by default weights/SmolLM2. A few
# minutes each. Needs build/thaw and python3.
set -euo pipefail
cd "$(dirname "$0")/.."

experiment=${1:-}
export MODEL=${2:-weights/SmolLM2-135M-Instruct.Q4_1.gguf}
export THAW=${THAW:-build/thaw} TEXT=tests/data/alice.txt
case $experiment in
  asr | budget) ;;
  *) echo "papers: expected asr or budget, found '$experiment'" >&2; exit 2 ;;
esac

python3 - "$experiment" <<'PYTHON'
import json
import os
import subprocess
import sys

PROMPT = "Explain how glaciers form, how they move, and how they change the land around them."


def thaw(command, *args):
    line = [os.environ["THAW"], command, "-m", os.environ["MODEL"], "-q", "--json", *map(str, args)]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


def table(title, columns, rows):
    print(title + "\n")
    for cells in [["", *columns], ["---"] * (len(columns) + 1), *rows]:
        print("| " + " | ".join(cells) + " |")


def generate(policy, n):
    at_once = ["--freeze-from", 0] if policy == "thaw" else []
    return thaw("generate", "--chat", "-p", PROMPT, "--temp", 0, "--ignore-eos", "-n", n,
                "--policy", policy, *at_once)


def read_tokens(run):
    """Tokens in the context, summed over decode steps: what full attention reads."""
    steps = run["output_tokens"] - 1
    return steps * run["prompt_tokens"] + steps * (steps + 1) / 2


def same_start(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def asr():
    policies, parts = ["asr", "thaw"], [125, 250, 500]
    full = generate("full", parts[-1])
    active, start, share = [], [], []
    for policy in policies:
        seen = attended = 0
        over_time = []
        for n in parts:
            run = generate(policy, n)
            read = run["attended_pct"] * read_tokens(run)
            over_time.append((read - attended) / (read_tokens(run) - seen))
            seen, attended = read_tokens(run), read
        active.append(", ".join(f"{percent:.0f}" for percent in over_time))
        share.append(f"{run['attended_pct']:.0f} %, so {100 - run['attended_pct']:.0f} % fewer")
        start.append(f"{same_start(run['tokens'], full['tokens'])} tokens")
    grids = thaw("needle", "--context", 1500, "--depths", 5, "--policy",
                 ",".join(["full", *policies]))["policies"]
    table("500 tokens written freely; passkeys of 7 digits in 1,500 tokens at five depths",
          ["paper, LLaMA-3 8B", *policies],
          [["tokens attended exactly", "55 to 67 % fewer active", *share],
           ["the same in tokens 1-125, 126-250, 251-500, %", "-", *active],
           ["text the same as with full for", "-", *start],
           [f"passkeys retrieved (full: {grids[0]['right']} of {grids[0]['asked']})", "retrieved",
            *(f"{grid['right']} of {grid['asked']}" for grid in grids[1:])],
           ["tokens attended exactly there", "-",
            *(f"{grid['attended_pct']:.0f} %" for grid in grids[1:])]])


def budget():
    policies = ["budget", "h2o", "thaw"]
    args = ["-f", os.environ["TEXT"], "-c", 1024, "--prefill", 512, "--windows", 1]
    runs = [thaw("perplexity", *args, "--policy", policy) for policy in policies]
    layers = runs[0]["layers"]
    least, most = (pick(layers, key=lambda l: l["budget_tokens"]) for pick in (min, max))
    speed = thaw("bench", "-p", 0, "-n", 32, "-r", 3, "-d", 2048, "-f", os.environ["TEXT"],
                 "--freeze-from", 0, "--policy", ",".join(["full", *policies]))["results"]

    def describe(layer):
        return f"layer {layers.index(layer)}: {layer['budget_tokens']:.0f} tokens"

    table("Budgets by layer entropy (budget) beside one for all layers (h2o), both a third of the "
          "tokens: 512 tokens prefilled, 512 decoded; decoding after 2,048 tokens",
          ["paper", *policies],
          [["memory", "4.18 % less, Qwen3 4B",
            *(f"{run['resident_pct']:.1f} % of f16" for run in runs)],
           ["quality", "ROUGE preserved",
            *(f"perplexity x {run['ratio']:.3f} ± {run['ratio_se']:.3f}" for run in runs)],
           ["KL to full, nats", "-", *(f"{run['kl_mean_nats']:.4f}" for run in runs)],
           ["time to decode a token", "46.6 % less, Mistral 7B",
            *(f"{100 * speed[0]['tok_s'] / s['tok_s']:.0f} % of full's" for s in speed[1:])],
           ["smallest and largest budget", "more for more entropy",
            f"{describe(least)}, {describe(most)}", "-", "-"]])


{"asr": asr, "budget": budget}[sys.argv[1]]()
PYTHON
