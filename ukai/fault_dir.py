"""What acts at fault points where the setting ``fault_dir`` names a directory: for tests only.

A test puts a file ``<node>.<process>.<point>`` there whose text is ``kill``, ``stop``, ``error`` or ``delay SECONDS``,
with ``@N`` after it for the N-th time from then on.  When that comes the file is renamed to ``….hit`` first, so that
the test knows.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from ukai import faults
from ukai.errors import DiskError, UkaiError

log = logging.getLogger(__name__)


class FaultDir:
    """The armed points of one process."""

    def __init__(self, root: str, node: str, process: str) -> None:
        self._root, self._prefix = Path(root), f"{node}.{process}."
        self._seen: dict[str, int] = {}

    def act(self, name: str) -> float:
        """See ``faults.Act``.  A name that is not in the table, or an order that is none, is a defect of a test."""
        path = self._root / (self._prefix + name)
        try:
            order, _, nth = path.read_text().partition("@")
        except FileNotFoundError:
            self._seen.pop(name, None)
            return 0.0
        seen = self._seen[name] = self._seen.get(name, 0) + 1
        if seen < int(nth or 1):
            return 0.0
        path.rename(path.with_name(path.name + ".hit"))
        log.info("fault point %s: %s", name, order)
        what, *seconds = order.split()
        if what == "delay":
            return float(seconds[0])
        if what == "error":
            assert name in faults.FAILING, f"the step {name} can't fail by itself"
            raise DiskError(f"fault point {name}")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
        return 0.0


def arm(root: str, node: str, process: str) -> None:
    """Raises UkaiError when there is no such directory."""
    if not os.path.isdir(root):
        raise UkaiError(f"fault_dir {root} is no directory; it is for tests, leave it empty")
    faults.arm(FaultDir(root, node, process).act)
