"""``ukai-blockd`` on a disk that can lose power: ``python -m tests.durability.blockd``.

The journal of the disk lies beside data_root.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import zmq

from tests.durability.cut import boot_file
from tests.durability.journal import JournaledDisk
from ukai import daemon
from ukai.blockd.server import BlockServer
from ukai.config import Config
from ukai.telemetry import Telemetry


def journal(data_root: str | Path) -> Path:
    return Path(f"{data_root}.journal")


def server(config: Config, node: str, context: zmq.Context[Any], telemetry: Telemetry) -> BlockServer:
    where = journal(config.data_root)
    boot = str(boot_file(where))
    return BlockServer(config, node, context, telemetry, disk=JournaledDisk(str(where)), boot_id_file=boot)


if __name__ == "__main__":
    sys.exit(daemon.main("blockd", server))
