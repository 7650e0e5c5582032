#!/usr/bin/env python3
"""Takes away one barrier, fence, atomic or wait at a time, and expects a test to notice.

    tests/barriers.py PROGRAM [SHARE]

PROGRAM: build/race/thaw-simt-tests, whose emulator leaves out the site that SIMT_SKIP names
(tests/simt/sites.cpp). Every test case that reaches the site is run, the shortest first, until one
fails or ThreadSanitizer reports a race. SHARE 8: every eighth site, others after every commit. What
may survive stands in tests/barriers.txt with its reason; it fails when it is caught after all. A
call in the source that no case reaches fails, too. Ends with "N passed, N failed".
"""
import glob
import os
import re
import subprocess
import sys
import time

import cases

SECONDS = 120  # of the processor, for one site
ORDERS = re.compile(r"^[^/]*(\b(__syncthreads\w*|__syncwarp|__threadfence\w*|atomic[A-Z]\w*|"
                    r"wait_for_previous_kernel|cp_async_wait<\d+>)|\.synchronize)\(")
DEFINITION = re.compile(r"inline void wait_for_previous_kernel")


def source_line(place):
    file, line = place.split(":")
    with open(file, encoding="utf-8") as source:
        return source.read().splitlines()[int(line) - 1].strip()


def places_of(program, sites):
    """{site: "FILE:LINE"} of those that stand in no test."""
    host = [s for s in sites if s.startswith("0x")]
    before = [hex(int(s, 16) - 1) for s in host]  # the call itself, not where it returns to
    found = subprocess.run(["addr2line", "-e", program, *before], check=True, capture_output=True,
                           text=True).stdout.splitlines()
    root = os.getcwd() + "/"
    places = dict(zip(host, (p.split(" ")[0].replace(root, "") for p in found)))
    places |= {s: s.rsplit(":", 1)[0] for s in sites if s not in places}
    places = {s: os.path.normpath(p) for s, p in places.items()}
    return {s: p for s, p in sorted(places.items()) if not p.startswith("tests/")}


def unreached(places):
    """Places in the source whose calls order memory and that no test case came by."""
    reached = set(places.values())
    for file in sorted(glob.glob("*/*.cu") + glob.glob("*/*.cuh")):
        with open(file, encoding="utf-8") as source:
            for number, line in enumerate(source, 1):
                if ORDERS.match(line) and not DEFINITION.search(line):
                    if f"{file}:{number}" not in reached:
                        yield f"{file}:{number}"


def expected_survivors():
    """The lines of source that tests/barriers.txt lists: "FILE | LINE | REASON"."""
    with open("tests/barriers.txt", encoding="utf-8") as file:
        lines = [line.split(" | ") for line in file if line.strip() and line[0] != "#"]
    return {(file.strip(), code.strip()) for file, code, _reason in lines}


def share_of(sites, share):
    log = subprocess.run(["git", "rev-list", "--count", "HEAD"], capture_output=True, text=True)
    turn = int(log.stdout or time.time() // 86400)
    return sites[turn % share::share]


def catch(program, site, kept):
    """The case that notices that the site is gone and how, or None."""
    left = SECONDS
    reach = sorted((k["seconds"], case) for case, k in kept.items() if site in k["sites"])
    for seconds, case in reach:
        if left < seconds:
            return None
        status, output, used = cases.run(program, case, 10 + 5 * seconds, SIMT_SKIP=site,
                                         TSAN_OPTIONS="halt_on_error=1")
        left -= used
        if status != 0:
            return case, "race" if "data race" in output else f"exit {status}"
    return None


def main(program, share):
    failed = 0
    if not cases.kept(program):
        failed = cases.run_all(program)[1]
    kept = cases.kept(program)
    places = places_of(program, sorted({s for k in kept.values() for s in k["sites"]}))
    for place in unreached(places):
        failed += 1
        print(f"barriers: {place}: no test case reaches: {source_line(place)}", flush=True)
    expected, passed = expected_survivors(), 0
    chosen = share_of(list(places), share)
    for site, caught in cases.each(lambda s: catch(program, s, kept), chosen):
        place = places[site]
        text = source_line(place)
        may_survive = (place.split(":")[0], text) in expected
        if (caught is None) == may_survive:
            passed += 1
            how = "survives, as listed" if caught is None else f"{caught[1]}: {caught[0]}"
            print(f"barriers: {place}: {how}", flush=True)
            continue
        failed += 1
        how = "survived" if caught is None else f"listed, and caught by {caught[0]}: {caught[1]}"
        print(f"barriers: {place}: {how}: {text}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1))
