"""The rows of the table: what fio does.  The same for every system."""

from __future__ import annotations

from dataclasses import dataclass

COMMON = (
    "--name=bench",
    "--ioengine=libaio",
    "--direct=1",
    "--fallocate=none",
    "--randrepeat=0",
    "--group_reporting",
    "--time_based",
)
"""Of every row; the file's size, runtime and ramp come beside."""

IOPS, MBPS = "/s", "MB/s"


@dataclass(frozen=True)
class Row:
    """One line of the table.  ``side`` is the part of fio's report that counts: read or write."""

    name: str
    title: str
    unit: str
    side: str
    options: tuple[str, ...]


def _random(name: str, title: str, rw: str, depth: int, side: str, *more: str) -> Row:
    return Row(name, title, IOPS, side, (f"--rw={rw}", "--bs=4k", f"--iodepth={depth}", *more))


ROWS = (
    Row("seq-write", "seq write 1 MiB qd4", MBPS, "write", ("--rw=write", "--bs=1M", "--iodepth=4")),
    Row("seq-read", "seq read 1 MiB qd4", MBPS, "read", ("--rw=read", "--bs=1M", "--iodepth=4")),
    _random("rand-read-1", "rand read 4 KiB qd1", "randread", 1, "read"),
    _random("rand-read-16", "rand read 4 KiB qd16", "randread", 16, "read"),
    _random("rand-write-1", "rand write 4 KiB qd1", "randwrite", 1, "write"),
    _random("rand-write-16", "rand write 4 KiB qd16", "randwrite", 16, "write"),
    _random("write-fsync", "write 4 KiB + fsync qd1", "randwrite", 1, "write", "--fsync=1"),
    _random("mixed-16", "rand 50/50 4 KiB qd16 (reads)", "randrw", 16, "read", "--rwmixread=50"),
)
BY_NAME = {row.name: row for row in ROWS}

FILL = Row("fill", "fill", MBPS, "write", ("--rw=write", "--bs=1M", "--iodepth=4"))
LARGE_WRITE = Row("write-1M-16", "seq write 1 MiB qd16", MBPS, "write", ("--rw=write", "--bs=1M", "--iodepth=16"))
LARGE_READ = Row("read-1M-16", "seq read 1 MiB qd16", MBPS, "read", ("--rw=read", "--bs=1M", "--iodepth=16"))


def at_depth(row: Row, depth: int) -> Row:
    """The same row with another number of requests under way."""
    options = tuple(o for o in row.options if not o.startswith("--iodepth="))
    return Row(row.name, row.title, row.unit, row.side, (*options, f"--iodepth={depth}"))
