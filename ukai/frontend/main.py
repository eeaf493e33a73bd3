"""``ukai-frontend``: settings, start and signals."""

from __future__ import annotations

import fcntl
import os
import signal
import sys

from ukai import daemon
from ukai.config import Config
from ukai.errors import UkaiError
from ukai.frontend import binding, mount
from ukai.frontend.server import FrontendServer

SWITCH_INTERVAL_S = 0.001
"""How long a thread may keep the interpreter from others.  Requests take some 50 µs of it each; what takes longer
(metadata, metrics) must not hold them up."""


def check(config: Config, node: str) -> int | None:
    """Find what can be wrong before the first thread.  Raises UkaiError."""
    binding.load(config.fuse_binding)
    mount.check_device()
    _be_alone(config)
    mount.prepare(config.mount_point)
    if not mount.allows_other():
        mount.log.warning("other users are not let in: write user_allow_other into /etc/fuse.conf, or run as root")
    return None


def _be_alone(config: Config) -> None:
    """One frontend per node: the lock ends with the process."""
    path = os.path.join(config.run_dir, "frontend.lock")
    try:
        os.makedirs(config.run_dir, 0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise UkaiError(f"run_dir {config.run_dir} can't be used: {e.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UkaiError(f"another ukai-frontend of this node runs already ({path} is locked)") from None


def main(argv: list[str] | None = None) -> int:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # libfuse would take it and unmount under open images
    return daemon.main("frontend", FrontendServer, check=check, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
