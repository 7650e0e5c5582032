#!/usr/bin/env python3
"""thaw beside llama.cpp: the same file, the same threads, in turn, medians and the ratio of each pair.

    tools/peers.sh                            builds llama.cpp into build/peers
    tools/speed.py -m MODEL.gguf              prompts and decoding, five times each
    tools/speed.py -m MODEL.gguf --tests all  also at depths, under thaw's policy, and start-up

A test is PROMPT,TOKENS,DEPTH[,POLICY], one of the first two 0: tokens a second of a prompt (pp) or of
decoding (tg) with DEPTH tokens in the cache. "start" is a whole process that reads a prompt of 32
tokens from a file that is in memory: seconds and peak memory; the first run of each side is not counted.
"""
import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

USUAL = "512,0,0 0,128,0"
ALL = ("4,0,0 8,0,0 16,0,0 512,0,0 4096,0,0 0,128,0 0,64,1024,full 0,64,4096,full 0,64,7680,full "
       "0,64,1024,thaw 0,64,4096,thaw 0,64,7680,thaw start")


def output(command):
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def thaw(args, test):
    prompt, tokens, depth, policy = test
    command = [args.thaw, "bench", "-m", args.model, "-t", args.threads, "-p", prompt, "-n", tokens,
               "-d", depth, "--policy", policy, "-r", 1, "--json"]
    if args.text:
        command += ["-f", args.text]
    return output([str(part) for part in command])["results"][0]["tok_s"]


def peer(args, test):
    prompt, tokens, depth, _ = test
    command = [args.peer, "-m", args.model, "-t", args.threads, "-p", prompt, "-n", tokens, "-d", depth,
               "-r", 1, "-o", "json"]
    return output([str(part) for part in command])[0]["avg_ts"]


def process(command):
    """Seconds and peak MiB of a process."""
    begin = time.monotonic()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise SystemExit(f"speed: {command[0]} failed")
    return time.monotonic() - begin, usage.ru_maxrss / 1024


def line(name, ours, theirs, digits):
    """Lists of figures, pair by pair."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    print(f"| {name} | {statistics.median(ours):.{digits}f} | {statistics.median(theirs):.{digits}f} | "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) |", flush=True)


def start(args):
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt:
        prompt.write("the " * 32)
        prompt.flush()
        commands = [[args.thaw, "generate", "-q", "-m", args.model, "-t", args.threads, "-f", prompt.name,
                     "-n", 1, "--temp", 0],
                    [args.peer, "-m", args.model, "-t", args.threads, "-p", 32, "-n", 0, "-r", 1,
                     "--no-warmup"]]
        runs = [[process(command) for command in commands] for _ in range(args.runs + 1)][1:]
    for i, (name, digits) in enumerate([("start, s", 3), ("peak memory, MiB", 0)]):
        line(name, *([run[side][i] for run in runs] for side in (0, 1)), digits)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("--tests", default=USUAL, help="tests between blanks, or all (%(default)s)")
    parser.add_argument("--text", help="a file for thaw to take its tokens from: what a policy reads "
                                       "depends on them")
    parser.add_argument("--thaw", default="build/thaw")
    parser.add_argument("--peer", default="build/peers/bin/llama-bench")
    args = parser.parse_args()
    print(f"{args.threads} threads, medians of {args.runs} pairs\n")
    print("| test | thaw tok/s | llama.cpp tok/s | thaw / llama.cpp (least, most) |\n|---|---:|---:|---:|")
    for word in (ALL if args.tests == "all" else args.tests).split():
        if word == "start":
            start(args)
            continue
        fields = word.split(",")
        test = [int(number) for number in fields[:3]] + [*fields[3:], "full"][:1]
        pairs = [(thaw(args, test), peer(args, test)) for _ in range(args.runs)]
        name = f"pp{test[0]}" if test[0] else f"tg{test[1]}"
        name += f"@d{test[2]} {test[3]}" if test[2] else ""
        line(name, *zip(*pairs), 1)


if __name__ == "__main__":
    main()
