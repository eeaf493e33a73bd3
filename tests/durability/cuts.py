"""Power cuts under a real guest: ``python -m tests.durability.cuts CUTS [--seed N]``; exit 1 at the first lost byte.

The guest's disk has two copies; it writes an SQLite database and files on an ext4.  At a random moment guest and
cluster are killed, and both nodes lose what was not synced.  Then each copy alone must be a sound disk with all that
the guest was told of, and so must the image, read through the cluster that was started again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster import Cluster
from tests.durability.blockd import journal
from tests.durability.cut import Loss, power_cut
from tests.durability.machine import Guest, assemble, build, check_image, make_filesystem
from tests.durability.manifest import metadata
from tests.machine import wait_for
from tests.processes.guest import QUICK, create, sync, wait_shown
from ukai.model import IN_SYNC

COMMANDS = {"blockd": [sys.executable, "-m", "tests.durability.blockd"]}
SETTINGS: dict[str, object] = {**QUICK, "active_idle": 1, "active_age": 5, "sync_rate": 0}
SIZE, BLOCK = 48 << 20, 4 << 20
MODES = ("wal", "truncate")
"""Journal modes of SQLite that keep each commit with ``synchronous=FULL``; DELETE does not, without EXTRA."""


class Campaign:
    """Cut after cut on one disk."""

    def __init__(self, cluster: Cluster, work: Path, seed: int) -> None:
        self.cluster, self.work = cluster, work
        self.chance = random.Random(seed)
        self.kernel, self.initrd = build(work)
        self.loss = Loss()
        self.acked = self.filed = 0
        self.checked = 0
        """Disks looked at."""
        make_filesystem(create(cluster, size=str(SIZE), block_size=str(BLOCK), hypervisors=(1, 2)))

    def cut(self, number: int) -> None:
        """Run a guest, by turns on either node, cut the power and look at all that is left."""
        node = 1 + number % 2
        self._run(node, MODES[number // 2 % 2])
        for address in self.cluster.addresses:
            self.loss += power_cut(journal(self.cluster.data_root(address)), self.chance)
        assert self._check_copies(), "no copy was whole"
        self.cluster.start_all()
        node = 1 + (number + 1) % 2
        wait_shown(self.cluster, "disk", node)
        shutil.copyfile(self.cluster.path("disk", node), self.work / "image")
        self._check(self.work / "image")

    def _run(self, node: int, mode: str) -> None:
        disk = self.cluster.path("disk", node)
        wait_for(disk.exists, f"the disk on node {node}", 20, self.cluster.tails)
        with Guest(self.kernel, self.initrd, disk, self.work / "console", mode, self.filed) as guest:
            guest.wait_told("ACK", 1)
            sync(self.cluster, "disk")
            guest.wait_told(self.chance.choice(("ACK", "FILE")), self.chance.randint(1, 30))
            assert guest.popen.poll() is None, "the run does not count: the guest had ended"
            guest.popen.kill()
            self.cluster.kill_all()
        guest.check()
        self.acked = max(self.acked, guest.told("ACK"))
        self.filed = max(self.filed, guest.told("FILE"))

    def _check_copies(self) -> int:
        """The disk as the block files of each node have it, where all of them are in-sync; how many there were."""
        image = metadata(self.cluster.root / "metadata")["disk"]
        count = 0
        for address in image.locations:
            replicas = [image.replica(address, block) for block in range(image.block_count)]
            if any(r is None or r.status != IN_SYNC for r in replicas):
                continue
            root = self.cluster.data_root(address) / "disk"
            parts = [root / f"{block:016d}" if r and r.generation else None for block, r in enumerate(replicas)]
            assemble(self.work / "image", parts, BLOCK, SIZE)
            self._check(self.work / "image")
            count += 1
        return count

    def _check(self, image: Path) -> None:
        check_image(image, self.acked, self.filed, self.work / "files")
        self.checked += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cuts", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ukai-cuts-") as work:
        root = Path(work)
        with Cluster(root / "cluster", nodes=2, frontends=(1, 2), settings=SETTINGS, commands=COMMANDS) as cluster:
            campaign = Campaign(cluster, root, options.seed)
            for number in range(options.cuts):
                campaign.cut(number)
                loss = campaign.loss
                print(
                    f"cut {number + 1}: {campaign.checked} disks sound, {campaign.acked} transactions and "
                    f"{campaign.filed} files told; of {loss.sectors} unsynced sectors {loss.sectors_lost} lost, of "
                    f"{loss.names} names {loss.names_lost}; {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
