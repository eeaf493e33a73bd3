"""``make bench``: runs what is chosen, keeps the results, shows them.

Alternates between the systems, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

from bench import cases, fio, measure, page, picture, report, resync, scale
from bench.contenders import ALL, PEERS, Contenders
from bench.results import Results, Sample
from bench.rows import BY_NAME, LARGE_READ, LARGE_WRITE
from bench.systems import FILE_BYTES, GlusterFS, MooseFS
from tests.cluster import Cluster
from tests.machine import compiled
from ukai.config import Config

PARTS = ("rows", "memory", "images", "cold", "resync", "scale", "loss", "curves")
RAMP_S = 0.5
QUICK = {"rounds": 1, "parts": ["rows", "memory", "images", "cold"]}
QUICK_ROWS = ["seq-write", "seq-read", "rand-read-1", "rand-write-1", "write-fsync"]
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "build" / "bench" / "results.json"
ROWS_SHARE = 0.66
"""Part of the time that the rounds may take, where other parts are wanted too."""
PAGE_WIDTH = 180
"""Of the tables where they go to a file."""
STRIKES = 2
"""A system that failed so often is left out from then on."""


def parse(argv: list[str] | None, env: dict[str, str]) -> argparse.Namespace:
    """The command line; BENCH_PEERS=1 and BENCH_QUICK=1 choose other defaults."""
    quick = env.get("BENCH_QUICK", "") not in ("", "0")
    peers = env.get("BENCH_PEERS", "") not in ("", "0")
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    words = {"action": "extend", "nargs": "+", "metavar": "NAME"}
    parser.add_argument("--parts", choices=PARTS, default=None, **words)  # type: ignore[arg-type]
    parser.add_argument("--rows", choices=ALL, default=None, **words)  # type: ignore[arg-type]
    parser.add_argument("--systems", default=None, **words, help="only these")  # type: ignore[arg-type]
    parser.add_argument("--rounds", type=int, default=QUICK["rounds"] if quick else 5)
    parser.add_argument("--runtime", type=float, default=2.0, help="seconds per row")
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="what doesn't fit is left out and told; 0: no limit"
    )
    parser.add_argument("--peers", action="store_true", default=peers, help="GlusterFS and MooseFS too")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="results; the picture lies beside")
    parser.add_argument("--merge", action="store_true", help="add to what --out has already")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what --out has")
    parser.add_argument("--page", action="store_true", help="put the figures into bench/README.md")
    parser.add_argument("--directory", default="/var/tmp", help="where the files are made, and removed again")
    args = parser.parse_args(argv)
    args.parts = args.parts or (QUICK["parts"] if quick else list(PARTS))
    args.rows = args.rows or (QUICK_ROWS if quick else list(ALL))
    return args


def about(args: argparse.Namespace) -> dict[str, object]:
    """What somebody needs to know who compares two results."""
    commands = {
        name: shlex.join(fio.command(BY_NAME[name], Path("FILE"), FILE_BYTES, args.runtime, RAMP_S))
        for name in args.rows
    }
    settings = Config()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "kernel": platform.release(),
        "python": platform.python_version() + (", UKAI compiled" if compiled() else ""),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "fio": subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False).stdout.strip(),
        "settings": "all defaults: "
        + ", ".join(
            f"{key}={getattr(settings, key)}"
            for key in ("fuse_binding", "short_circuit", "active_limit", "sync_rate", "sync_chunk", "sync_window")
        ),
        "commands": commands,
        "load": os.getloadavg()[0],
    }


def install_peers() -> None:
    """Debian's packages, without starting what they bring.  What fails shows when the system is set up."""
    wanted = [package for kind in (GlusterFS, MooseFS) for package in kind.packages]
    if all(shutil.which(name) for name in ("glusterd", "mfsmaster", "mfschunkserver", "mfsmount")):
        return
    print(
        f"installing {' '.join(wanted)}; they stay (apt-get purge takes them away), no service is started", flush=True
    )
    refuse = Path("/usr/sbin/policy-rc.d")  # Debian's way to say that an installation starts no service
    ours = not refuse.exists()
    if ours:
        refuse.write_text("#!/bin/sh\nexit 101\n")
        refuse.chmod(0o755)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
            done = subprocess.run(["apt-get", *words], env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"apt-get {words[0]}: {done.stderr.strip()[-500:]}", flush=True)
    finally:
        if ours:
            refuse.unlink()


class Run:
    """One run of the benchmark, over what the results have already."""

    def __init__(self, args: argparse.Namespace, results: Results, contenders: Contenders) -> None:
        self._args, self._results, self._contenders = args, results, contenders
        self._began = time.monotonic()

    def _out_of_time(self, share: float = 1.0) -> bool:
        """Whether that part of the time that was given is over."""
        return bool(self._args.minutes) and time.monotonic() - self._began > self._args.minutes * 60 * share

    def _left_out(self, what: str) -> None:
        line = f"{what}: left out, the {self._args.minutes:g} minutes were not enough"
        self._results.failures.append(line)
        print(line, flush=True)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Run a part, if it is wanted; one that fails doesn't end the others."""
        if name not in self._args.parts:
            return
        if self._out_of_time():
            self._left_out(f"part {name}")
            return
        began = time.monotonic()
        try:
            work()
        except Exception as e:
            self._contenders.failed("ukai", f"part {name}", e)
        self._results.save(self._args.out)
        print(f"part {name}: {time.monotonic() - began:.0f} s", flush=True)

    def keep(self, sample: Sample) -> None:
        self._results.samples.append(sample)
        latency = f"  p50 {sample.p50_us:8.0f} µs  p99 {sample.p99_us:8.0f} µs" if sample.p50_us else ""
        again = f"  {sample.attempts} attempts, {sample.stolen:.1%} stolen" if sample.attempts > 1 else ""
        print(f"  {sample.row:22} {sample.system:16} {sample.value:12,.2f} {sample.unit:6}{latency}{again}", flush=True)

    def rows(self) -> None:
        """The table: in each round each row on each system, in turns."""
        names = self._args.systems or [n for n in self._contenders.table if self._args.peers or n not in PEERS]
        strikes = dict.fromkeys(names, 0)
        for number in range(1, self._args.rounds + 1):
            print(f"round {number} of {self._args.rounds}", flush=True)
            for name in self._args.rows:
                if self._out_of_time(ROWS_SHARE if self._args.parts != ["rows"] else 1.0):
                    self._left_out(f"rows from {name} of round {number}")
                    return
                for who in names if number % 2 else reversed(names):
                    contender = self._contenders.table[who]
                    if name not in contender.rows or (number > 1 and not contender.every_round):
                        continue
                    system = self._contenders.get(who)
                    if system is None:
                        continue
                    try:
                        self.keep(measure.sample(system, BY_NAME[name], number, self._args.runtime, RAMP_S))
                    except Exception as e:
                        self._contenders.failed(who, name, e)
                        strikes[who] += 1
                        if strikes[who] == STRIKES:
                            self._contenders.drop(who)
            self._results.save(self._args.out)

    def memory(self) -> None:
        """The largest requests, many at a time: what the processes need at most."""
        system = self._contenders.get("ukai")
        if system is None:
            return
        peaks: dict[str, float] = {}
        for row in (LARGE_WRITE, LARGE_READ):
            sample = measure.sample(system, row, 1, self._args.runtime, RAMP_S)
            self.keep(sample)
            for name, peak in sample.peak_mb.items():
                kind = name.rstrip("0123456789")
                peaks[kind] = max(peak, peaks.get(kind, 0.0))
        for kind, peak in peaks.items():
            self.keep(Sample("ukai", f"{kind}-peak", peak, "MB"))

    def all(self, directory: Path) -> None:
        """All parts that are wanted, the most telling first."""

        def on_cluster(name: str, case: Callable[[Cluster, Callable[[Sample], None], float], None]) -> None:
            def work() -> None:
                cluster = self._contenders.ukai.start(directory / "ukai")
                cluster.wait_ready()
                case(cluster, self.keep, min(self._args.runtime, 3.0))

            self.part(name, work)

        self.part("rows", self.rows)
        self.part("memory", self.memory)
        on_cluster("images", cases.images)
        on_cluster("cold", cases.cold)
        on_cluster("resync", resync.measure)
        self.part("scale", lambda: scale.measure(directory / "scale", self.keep))
        on_cluster("loss", cases.loss)
        on_cluster("curves", cases.curves)


def _ended(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv, dict(os.environ))
    console = Console(width=None if sys.stdout.isatty() else PAGE_WIDTH)
    results = Results.load(args.out) if (args.merge or args.show) and args.out.exists() else Results()
    if not args.show:
        if os.geteuid() != 0:
            print("the benchmark mounts and makes namespaces: run it as root", file=sys.stderr)
            return 2
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _ended)
        if args.peers:
            install_peers()
        results.about = {**results.about, **about(args)}
        directory = Path(tempfile.mkdtemp(prefix="ukai-bench-", dir=args.directory))
        contenders = Contenders(directory, results)
        try:
            Run(args, results, contenders).all(directory)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # what cleans up is not interrupted
            contenders.close()
            results.save(args.out)
            shutil.rmtree(directory, ignore_errors=True)
    report.show(results, console)
    drawing = args.out.with_suffix(".svg")
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_text(picture.draw(results))
    if args.page:
        page.update(results)
    print(f"results: {args.out}\npicture: {drawing}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
