"""A frontend process over a fake node."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from tests import machine
from tests.cluster import Process
from tests.frontend.fake_node import NODE, FakeNode
from tests.machine import PortRange, wait_for

READY_S = 15.0
IO_TIMEOUT_S = 2.0
SIZE = 1_000_000
"""No multiple of the block size, nor of 512."""
BLOCK_SIZE = 50_000


class Stand:
    """A fake node with one image, ``disk``, and a frontend.  A context manager: ends all and checks what was left."""

    def __init__(self, root: Path, binding: str, **settings: object) -> None:
        self.root = root
        self.mount = root / "mnt"
        self.disk = self.mount / "disk"
        self.run_root = Path(tempfile.mkdtemp(prefix="ukai-", dir="/tmp"))  # short: socket paths hold 107 bytes
        self.ports = PortRange([NODE], 6)
        base = self.ports.first
        values: dict[str, object] = {
            "config": root / "ukai.toml",
            "run_dir": self.run_root,
            "mount_point": self.mount,
            "node_address": NODE,
            "metad_address": NODE,
            "fuse_binding": binding,
            "control_port": base,
            "proxy_port": base + 1,
            "publish_port": base + 2,
            "metad_events_port": base + 3,
            "blockd_events_port": base + 4,
            "frontend_events_port": base + 5,
            "io_timeout": IO_TIMEOUT_S,
            "replica_timeout": 1,
            "lease": 2,
            "beat_interval": 0.2,
            "log_format": "json",
            **settings,
        }
        (root / "ukai.toml").write_text("")
        env = {k: v for k, v in os.environ.items() if not k.startswith("UKAI_")}
        env |= {f"UKAI_{k.upper()}": str(v) for k, v in values.items()}
        env |= {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"}
        self.process = Process(NODE, "frontend", env, root / "frontend.log")
        self.node = FakeNode(self.run_root, base, base + 2)
        self.node.add("disk", SIZE, BLOCK_SIZE)
        self.allowed: list[str] = []

    def expect_log(self, pattern: str) -> None:
        self.allowed.append(pattern)

    def start(self) -> None:
        self.process.start()
        wait_for(self.is_mounted, "the mount", READY_S, self.process.log.tail)

    def is_mounted(self) -> bool:
        assert self.process.alive, f"the frontend ended: {self.process.log.tail()}"
        return machine.mount_answers(self.mount)

    def logged(self, text: str) -> bool:
        return any(text in line.message for line in self.process.log.lines())

    def __enter__(self) -> Self:
        try:
            self.node.start_blockd()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faults = self.close()
        if kind is None:
            assert not faults, "\n".join(faults)

    def close(self) -> list[str]:
        faults = []
        if self.process.popen is not None:
            try:
                if self.process.alive:
                    self.process.signal(signal.SIGTERM)
                if (code := self.process.wait()) != 0:
                    faults.append(f"the frontend ended with {code}: {self.process.log.tail()}")
            except AssertionError as e:
                faults.append(str(e))
                machine.abort_fuse(self.mount)
                self.process.signal(signal.SIGKILL)
                self.process.wait()
        self.node.close()
        for what, end in machine.left_behind(self.root, self.run_root, self.ports):
            faults.append(what)
            end()
        self.ports.close()
        shutil.rmtree(self.run_root, ignore_errors=True)
        for line in self.process.log.lines():
            if line.serious and not any(re.search(p, line.message) for p in self.allowed):
                faults.append(f"undeclared: {line}")
        return faults


def errno_of(work: object, *args: object) -> int:
    """The errno with which a call fails; 0 when it doesn't."""
    assert callable(work)
    try:
        work(*args)
    except OSError as e:
        return e.errno or -1
    return 0
