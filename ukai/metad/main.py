"""The process ukai-metad."""

from __future__ import annotations

import logging
import sys

from ukai import daemon
from ukai.config import Config
from ukai.metad.server import Server

log = logging.getLogger(__name__)


def check(config: Config, node: str) -> int | None:
    """On a node that is not metad's there is nothing to do."""
    if node != config.metad_address:
        log.info("metad runs on %s, not on this node %s", config.metad_address, node)
        return daemon.EXIT_NOT_HERE
    return None


def main() -> None:
    sys.exit(daemon.main("metad", Server, check=check))


if __name__ == "__main__":
    main()
