#!/usr/bin/env python3
"""What a policy costs and what it saves: the tables of docs/kvstore.md, in markdown.

    tools/texts.sh                       gets the texts into build/texts
    tools/quality.py -m MODEL.gguf default economy long others needles

default, economy   thaw's presets: 1,024 tokens of each text read exactly, 1,024 decoded one by one
long               the default after 4,096 tokens
others             all tokens in q8_0 and q4_0, and the other policies with a third of the tokens
needles            passkeys of 7 and 64 digits, one and four in a text, in 1,500 to 7,500 tokens,
                   each asked for twice
verified           the same with --verify 32

Each text runs beside --policy full with f16; KL is from that, +- is one standard error. Figures do
not hang on the number of threads. On two cores: default, economy 4 minutes each, long 8, others 15,
needles and verified 40 each.
"""
import argparse
import json
import statistics
import subprocess
import sys

TEXTS = ["jargon", "perlretut", "argparse", "stb"]
USUAL = {"-c": 2048, "--prefill": 1024}
THIRD = {"--hot-fraction": 0.333}
OTHERS = [("q8_0 for all tokens", {"--kv-type": "q8_0"}), ("q4_0 for all tokens", {"--kv-type": "q4_0"}),
          *((f"`{policy}`, a third", {"--policy": policy, **THIRD}) for policy in ("window", "h2o", "budget", "asr"))]
COLUMNS = [("resident %", "resident_pct", "{:.1f}"), ("KL mean", "kl_mean_nats", "{:.4f}"),
           ("KL 99 %", "kl_p99_nats", "{:.3f}"), ("perplexity / full", "ratio", "{:.4f}"),
           ("same top-1 %", "top1_agreement_pct", "{:.1f}"),
           ("recalls / layer / step", "recalls_per_layer_step", "{:.1f}"),
           ("cold bytes read a step, %", "cold_read_pct", "{:.2f}")]
ERRORS = {"kl_mean_nats": ("kl_se_nats", "{:.5f}"), "ratio": ("ratio_se", "{:.4f}")}


def row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def head(*columns):
    row(columns)
    row(["---"] + ["---:"] * (len(columns) - 1))


def run(args, command, flags):
    """The JSON document that thaw prints."""
    line = [args.thaw, command, "-m", args.model, "-q", "--json"]
    line += [str(part) for flag in flags.items() for part in flag if part != ""]
    line += ["-t", str(args.threads)] if args.threads else []
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"quality: error: failed: {' '.join(line)}")
    return json.loads(done.stdout)


def perplexity(args, flags):
    """A document for each text."""
    for text in TEXTS:
        yield run(args, "perplexity", {"-f": f"{args.texts}/{text}.txt", "--windows": 1, **USUAL, **flags})


def cell(key, form, document):
    if key not in ERRORS:
        return form.format(document[key])
    error, error_form = ERRORS[key]
    return f"{form.format(document[key])} ± {error_form.format(document[error])}"


def preset(args, flags):
    head("text", *(name for name, _, _ in COLUMNS))
    documents = []
    for text, document in zip(TEXTS, perplexity(args, {"--policy": "thaw", **flags})):
        documents.append(document)
        row([text] + [cell(key, form, document) for _, key, form in COLUMNS])
    means = {key: statistics.mean(d[key] for d in documents) for _, key, _ in COLUMNS}
    row(["mean"] + [form.format(means[key]) for _, key, form in COLUMNS])


def others(args):
    keys = [("kl_mean_nats", "{:.5f}"), ("ratio", "{:.4f}")]
    head("mean (least to most)", "resident %", "KL mean", "perplexity / full", "same top-1 %")
    for name, flags in OTHERS:
        documents = list(perplexity(args, flags))
        mean = lambda key: statistics.mean(d[key] for d in documents)
        spans = [f"{form.format(mean(key))} ({form.format(min(d[key] for d in documents))} to "
                 f"{form.format(max(d[key] for d in documents))})" for key, form in keys]
        row([name, f"{mean('resident_pct'):.1f}", *spans, f"{mean('top1_agreement_pct'):.1f}"])


def needles(args, flags):
    head("tokens", "digits", "keys in a text", "asked", "`full` right", "of these `thaw` right",
         "`thaw` right in all", "checks")
    for context in 1500, 4096, 7500:
        for digits in 7, 64:
            for keys, depths in (4, 4), (1, 5):
                document = run(args, "needle", {
                    "--context": context, "--digits": digits, "--needles": keys, "--depths": depths,
                    "--second": "", "--prefill-all": "", "--prefill-question": "", **flags})
                full, thaw = document["policies"]
                row([f"{context:,}", str(digits), str(keys), str(full["asked"]), str(full["right"]),
                     str(thaw["right_of_those"]), str(thaw["right"]), str(thaw["checks"])])


TABLES = {
    "default": lambda args: preset(args, {}),
    "economy": lambda args: preset(args, {"--preset": "economy"}),
    "long": lambda args: preset(args, {"-c": 5120, "--prefill": 4096}),
    "others": others,
    "needles": lambda args: needles(args, {}),
    "verified": lambda args: needles(args, {"--verify": 32}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="TABLE", choices=TABLES, help=", ".join(TABLES))
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--thaw", default="build/thaw")
    parser.add_argument("--texts", default="build/texts")
    args = parser.parse_args()
    for name in args.tables:
        print(f"\n{name}\n")
        TABLES[name](args)


if __name__ == "__main__":
    main()
