"""Run seeds: ``python -m tests.sim.run FIRST COUNT [--seconds S] [--trace]``; exit 1 when one fails.

Set iteration must not depend on chance, so each worker is started with a fixed hash seed.  It runs UKAI as it is
installed, compiled; with a rule broken, which a compiled class does not let anybody do, the sources.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.machine import check_installed

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 8.0


def work(
    first: int, count: int, step: int, seconds: float, trace: bool, force: str, mutation: str, hasty: bool
) -> None:
    """In a worker: run seeds, a line of JSON for each."""
    from tests.sim import mutations
    from tests.sim.scenario import run

    logging.disable(logging.INFO if trace else logging.CRITICAL)
    forced = json.loads(force)
    if mutation:
        known = mutations.BY_NAME[mutation]
        mutations.apply(known)
        forced = {**known.forced, **forced}
    for seed in range(first, first + count, step):
        result = run(seed, seconds, forced, hasty)
        if trace:
            sys.stderr.write("\n".join(result.trace) + "\n")
        record = {"seed": seed, "violations": result.violations, "counts": result.counts, "faults": result.faults}
        print(json.dumps({**record, "parameters": result.parameters, "digest": result.digest()}), flush=True)
        if hasty and result.violations:
            return


def worker(
    first: int,
    count: int,
    step: int,
    seconds: float,
    trace: bool = False,
    *,
    force: str = "{}",
    mutation: str = "",
    hasty: bool = False,
    compiled: bool = True,
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sim.run", "--worker", str(first), str(count), "--step", str(step)]
    command += ["--force", force, "--mutation", mutation]
    command += ["--seconds", str(seconds), *(["--trace"] if trace else []), *(["--hasty"] if hasty else [])]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    if compiled and not mutation:
        check_installed()
        environment["PYTHONSAFEPATH"] = "1"  # the tree comes after what is installed
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What a worker tells of each seed, once it has ended well."""
    out, _ = process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="simulated time before the faults heal")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--force", default="{}", help="parameters instead of those drawn, as JSON")
    parser.add_argument("--mutation", default="", help="break one rule; see mutations.py")
    parser.add_argument("--trace", action="store_true", help="every event on stderr")
    parser.add_argument("--hasty", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(
            options.first,
            options.count,
            options.step,
            options.seconds,
            options.trace,
            options.force,
            options.mutation,
            options.hasty,
        )
        return 0
    began, done, failed = time.monotonic(), 0, 0
    totals: dict[str, int] = {}
    hands = 1 if options.trace else min(os.cpu_count() or 1, options.count)
    workers = [
        worker(
            options.first + hand,
            options.count - hand,
            hands,
            options.seconds,
            options.trace,
            force=options.force,
            mutation=options.mutation,
        )
        for hand in range(hands)
    ]
    for process in workers:
        assert process.stdout is not None
    streams = [w.stdout for w in workers if w.stdout is not None]
    while streams:
        for stream in list(streams):
            line = stream.readline()
            if not line:
                streams.remove(stream)
                continue
            record = json.loads(line)
            done += 1
            for what, number in [*record["counts"].items(), *record["faults"].items()]:
                totals[what] = totals.get(what, 0) + number
            if record["violations"]:
                failed += 1
                print(f"seed {record['seed']}: {record['violations'][0]} {record['parameters']}", flush=True)
            elif done % 1000 == 0:
                print(f"{done} seeds, {failed} failed, {time.monotonic() - began:.0f} s", flush=True)
    ended = [w.wait() for w in workers]
    print(f"{done} seeds, {failed} failed, {time.monotonic() - began:.0f} s; {totals}")
    return 1 if failed or any(ended) or done != options.count else 0


if __name__ == "__main__":
    sys.exit(main())
