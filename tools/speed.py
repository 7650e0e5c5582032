#!/usr/bin/env python3
"""thaw beside llama.cpp: the same file, the same threads, in turn, medians and the ratio of each pair.

    tools/peers.sh                      builds llama.cpp into build/peers
    tools/speed.py -m MODEL.gguf        runs both, five times each

Prints a markdown table: tokens a second of a prompt (pp) and of decoding (tg).
"""
import argparse
import json
import statistics
import subprocess


def run(command):
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def thaw(args, test):
    prompt, tokens, depth = test
    command = [args.thaw, "bench", "-m", args.model, "-t", args.threads, "-p", prompt, "-n", tokens,
               "-d", depth, "-r", 1, "--json"]
    return run([str(part) for part in command])["results"][0]["tok_s"]


def peer(args, test):
    prompt, tokens, depth = test
    command = [args.peer, "-m", args.model, "-t", args.threads, "-p", prompt, "-n", tokens, "-d", depth,
               "-r", 1, "-o", "json"]
    return run([str(part) for part in command])[0]["avg_ts"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("--tests", default="512,0,0 0,128,0",
                        help="prompt,tokens,depth of each test, one of the first two 0 (%(default)s)")
    parser.add_argument("--thaw", default="build/thaw")
    parser.add_argument("--peer", default="build/peers/bin/llama-bench")
    args = parser.parse_args()
    print(f"{args.threads} threads, medians of {args.runs} pairs\n")
    print("| test | thaw tok/s | llama.cpp tok/s | thaw / llama.cpp (least, most) |\n|---|---:|---:|---:|")
    for word in args.tests.split():
        test = [int(number) for number in word.split(",")]
        pairs = [(thaw(args, test), peer(args, test)) for _ in range(args.runs)]
        ours, theirs = (statistics.median(side) for side in zip(*pairs))
        ratios = [a / b for a, b in pairs]
        name = f"pp{test[0]}" if test[0] else f"tg{test[1]}"
        name += f"@d{test[2]}" if test[2] else ""
        print(f"| {name} | {ours:.1f} | {theirs:.1f} | {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f}, {max(ratios):.2f}) |", flush=True)


if __name__ == "__main__":
    main()
