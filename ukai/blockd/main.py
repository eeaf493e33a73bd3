"""The block server process: ``ukai-blockd``."""

from __future__ import annotations

import sys

from ukai import daemon
from ukai.blockd.server import BlockServer


def main() -> None:
    sys.exit(daemon.main("blockd", BlockServer, busy_poll=True))


if __name__ == "__main__":
    main()
