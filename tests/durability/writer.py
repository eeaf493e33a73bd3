"""A guest whose every record is known outside: ``writer.py IMAGE LOG JOBS SLOTS STRIDE SEED``.

Each job is a thread with slots of its own and a way to make its writes last: an fsync after some writes, a handle with
O_DSYNC or O_SYNC, or none, so that there is always something to lose.  A line of LOG is a JSON list: ["begun", [[slot,
pass], …]] before the first write of a batch, ["done", [[slot, pass], …]] when it is on the disk, ["failed", errno],
["wrong", slot, text].  A job ends with its first error.  The log survives whatever is done to the cluster and its
disks.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import sys
import threading
import time

RECORD_BYTES = 4096
SECTOR = 512
HEAD = struct.Struct("<8sQQQ")
MAGIC = b"manifest"
WAYS = ("fsync", "none", "O_DSYNC", "none", "fsync", "none", "O_SYNC", "none")
FLAGS = {"O_DSYNC": os.O_DSYNC, "O_SYNC": os.O_SYNC}
BATCH_LIMIT = 8
THOUGHT_S = 0.02
"""How long at most a job that syncs does something else: a sync covers what all have written."""


def sector(slot: int, number: int, index: int) -> bytes:
    """What pass ``number`` writes to one sector of a slot."""
    head = HEAD.pack(MAGIC, slot, number, index)
    return head + hashlib.shake_128(head).digest(SECTOR - len(head))


def record(slot: int, number: int) -> bytes:
    return b"".join(sector(slot, number, i) for i in range(RECORD_BYTES // SECTOR))


def passes_in(data: bytes, slot: int) -> set[int]:
    """The passes that the sectors of a record are from; 0: zeros.  Raises ValueError for anything else."""
    found = set()
    for index in range(RECORD_BYTES // SECTOR):
        part = data[index * SECTOR : (index + 1) * SECTOR]
        if not any(part):
            found.add(0)
            continue
        number = HEAD.unpack_from(part)[2]
        if part != sector(slot, number, index):
            raise ValueError(f"sector {index} of slot {slot} is none of ours: {part[:32].hex()}")
        found.add(number)
    return found


def slots_of(job: int, jobs: int, count: int, stride: int) -> list[int]:
    """The slots of a job, spread over the whole image."""
    return [(i * jobs + job) * stride for i in range(count)]


def work(disk: int, log: int, slots: list[int], way: str, chance: random.Random) -> None:
    """One job, until its first error."""
    passes = dict.fromkeys(slots, 0)

    def note(*what: object) -> None:
        os.write(log, (json.dumps(what) + "\n").encode())

    try:
        while True:
            batch = [(slot, passes[slot] + 1) for slot in chance.sample(slots, chance.randint(1, BATCH_LIMIT))]
            note("begun", batch)
            for slot, number in batch:
                os.pwrite(disk, record(slot, number), slot * RECORD_BYTES)
            if way == "fsync":
                os.fsync(disk)
            if way != "none":
                note("done", batch)
                time.sleep(chance.uniform(0, THOUGHT_S))
            passes.update(batch)
            slot = chance.choice(slots)
            data = os.pread(disk, RECORD_BYTES, slot * RECORD_BYTES)
            if data != (record(slot, passes[slot]) if passes[slot] else bytes(RECORD_BYTES)):
                note("wrong", slot, f"pass {passes[slot]} was written, this was read: {data[:32].hex()}")
                return
    except OSError as e:
        note("failed", e.errno)


def main(image: str, path: str, jobs: int, count: int, stride: int, seed: int) -> int:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    threads = []
    for job in range(jobs):
        way = WAYS[job % len(WAYS)]
        disk = os.open(image, os.O_RDWR | FLAGS.get(way, 0))
        slots = slots_of(job, jobs, count, stride)
        args = (disk, log, slots, way, random.Random(f"{seed} {job}"))
        threads.append(threading.Thread(target=work, args=args))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])))
