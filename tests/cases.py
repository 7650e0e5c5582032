#!/usr/bin/env python3
"""Runs each test case of a doctest program in a process of its own, on all cores.

    tests/cases.py PROGRAM

Prints what the failed ones printed and ends with "N passed, N failed". PROGRAM.cases keeps how long
each took, so that the longest start first the next time, and which sites it reached, where the
program tells (tests/simt/sites.cpp).
"""
import concurrent.futures
import json
import math
import os
import re
import subprocess
import sys
import tempfile


def names(program):
    listed = subprocess.run([program, "-ltc"], check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if not line.startswith(("[doctest]", "="))]


def run(program, case, limit=600, **environment):
    """(exit status, what it printed, seconds); all seconds are of the processor but CASE_SECONDS."""
    command = ["timeout", "--foreground", "-k", "5", os.environ.get("CASE_SECONDS", "1200"),
               "prlimit", f"--cpu={math.ceil(limit)}", program,
               "-tc=" + re.sub("[,*]", "?", case)]  # commas part patterns
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                   env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said, status = output.read(), process.returncode
        if status == 0 and not re.search(r"test cases: *[1-9]", said):
            status, said = 1, "it was not run\n" + said
        return status, said, usage.ru_utime + usage.ru_stime


def each(work, items):
    """work(item) of all, on all cores; yields (item, result) as they end."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(work, item): item for item in items}
        for done in concurrent.futures.as_completed(running):
            yield running[done], done.result()


def kept(program):
    """What PROGRAM.cases says of each case; nothing if the program is newer."""
    path = program + ".cases"
    if not os.path.exists(path) or os.path.getmtime(path) < os.path.getmtime(program):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def run_with_sites(program, case):
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as sites:
        status, output, seconds = run(program, case, SIMT_SITES=sites.name)
        return status, output, seconds, sorted(set(sites.read().split()))


def run_all(program):
    """Prints what failed; returns how many passed and failed."""
    before = kept(program)
    cases = sorted(names(program), key=lambda c: -before.get(c, {}).get("seconds", 0))
    found, failed = {}, 0
    for case, (status, output, seconds, sites) in each(lambda c: run_with_sites(program, c), cases):
        found[case] = {"seconds": round(seconds, 2), "sites": sites}
        if status != 0:
            failed += 1
            print(f"cases: failed: {case}: exit {status}\n{output}", flush=True)
    with open(program + ".cases", "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    return len(cases) - failed, failed


if __name__ == "__main__":
    passed, failed = run_all(sys.argv[1])
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)
