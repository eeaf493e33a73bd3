"""Three nodes on one machine, 127.0.0.1 to 127.0.0.3, each a supervisord with links to the files in this directory.

They live in a temporary directory and on UKAI's own ports; ``stop`` takes all of it away, whatever state it is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ukai.config import KEYS, Config

DEPLOY = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
PROGRAMS = ("metad", "blockd", "frontend")
POLL_S = 0.1
STOP_S = 25.0
AGAIN_S = 3.0
UNMOUNT_S = 5.0
TAIL_LINES = 12
FUSE_CONNECTIONS = Path("/sys/fs/fuse/connections")


class DemoError(Exception):
    """The demo can't go on; the message says why."""


def until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    """Ask ``condition`` until it is true.  Raises DemoError that names ``what``, after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(f"waited {timeout_s:g} s for {what} in vain")
        time.sleep(POLL_S)


def mounted_under(where: Path) -> list[tuple[Path, str]]:
    """What is mounted at or below ``where``, the last first: (mount point, device number)."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if Path(fields[4]).is_relative_to(where):
            found.append((Path(fields[4]), fields[2]))
    return found[::-1]


def _unmount(where: Path, *options: str) -> bool:
    return subprocess.run(["umount", *options, where], capture_output=True, check=False).returncode == 0


class Node:
    """One node: its directory, its environment, its supervisord."""

    def __init__(self, root: Path, number: int) -> None:
        self.address = ADDRESSES[number - 1]
        self.directory = root / f"node{number}"
        self.data = self.directory / "data"
        self.mount = self.directory / "ukai"
        self.directory.mkdir()
        for name in ("supervisord.conf", "ukai.toml"):
            (self.directory / name).symlink_to(DEPLOY / name)
        places = {
            "NODE_ADDRESS": self.address,
            "METADATA_ROOT": str(self.directory / "metadata"),
            "DATA_ROOT": str(self.data),
            "RUN_DIR": str(self.directory / "run"),
            "MOUNT_POINT": str(self.mount),
        }
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("UKAI_")}
        self.environment |= {f"UKAI_{key}": value for key, value in places.items()}
        self.environment["UKAI_CONFIG"] = str(self.directory / "ukai.toml")
        self.environment["PATH"] = f"{BIN}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self.supervisord: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command: list[str | Path] = [BIN / "supervisord", "-n", "-c", self.directory / "supervisord.conf"]
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if 0 < allowed < 65536:  # a container may not let even root raise it
            command += ["--minfds", str(allowed)]
        with (self.directory / "supervisord.out").open("wb") as out:
            self.supervisord = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def supervisorctl(self, *args: str) -> str:
        """What supervisorctl answers."""
        command: list[str | Path] = [BIN / "supervisorctl", "-c", self.directory / "supervisord.conf", *args]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout.strip()

    def kill(self, program: str) -> int:
        """SIGKILL a program, and have supervisord leave it down.  Returns the process it was."""
        pid = self.supervisorctl("pid", program)
        if not pid.isdecimal() or pid == "0":
            raise DemoError(f"{program} of {self.address} does not run: {pid}")
        os.kill(int(pid), signal.SIGKILL)

        def down() -> bool:
            self.supervisorctl("stop", program)  # refused in the moment between its end and its new start
            return "STOPPED" in self.supervisorctl("status", program)

        until(down, f"{program} of {self.address} down", 10)
        return int(pid)

    def log_tails(self) -> str:
        """The last lines of all its logs."""
        parts = []
        for path in sorted([*self.directory.glob("*.log"), self.directory / "supervisord.out"]):
            if path.exists() and (lines := path.read_text(errors="replace").splitlines()):
                parts.append("\n  ".join([f"--- {path.parent.name}/{path.name}", *lines[-TAIL_LINES:]]))
        return "\n".join(parts)


class Nodes:
    """The three nodes."""

    def __init__(self) -> None:
        self._check()
        self.root = Path(tempfile.mkdtemp(prefix="ukai-demo-"))
        self.nodes = [Node(self.root, number) for number in (1, 2, 3)]

    @staticmethod
    def _check() -> None:
        """Raise DemoError for what would make the demo fail later."""
        if not Path("/dev/fuse").exists():
            subprocess.run(["modprobe", "fuse"], capture_output=True, check=False)
        if not Path("/dev/fuse").exists():
            raise DemoError(
                "there is no /dev/fuse on this machine: load the kernel module fuse, or let the container see it"
            )
        ports = [getattr(Config(), name) for name in KEYS if name.endswith("_port")]
        for address in ADDRESSES:
            for port in ports:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        probe.bind((address, port))
                    except OSError as e:
                        raise DemoError(
                            f"port {port} of {address} is taken ({e.strerror}); the demo needs the ports "
                            f"{min(ports)} to {max(ports)}: stop what uses them and start again"
                        ) from e

    def start(self) -> None:
        for node in self.nodes:
            node.start()

    def wait_ready(self, timeout_s: float = 40) -> None:
        """Until all nodes are up and all mounts are there."""

        def ready() -> bool:
            for node in self.nodes:
                if node.supervisord is not None and node.supervisord.poll() is not None:
                    raise DemoError(f"supervisord of {node.address} ended with {node.supervisord.returncode}")
            done = self._ctl("node", "list", "--json", "--timeout", "2", capture_output=True)
            if done.returncode != 0:
                return False
            up = {n["address"] for n in json.loads(done.stdout)["nodes"] if n["state"] == "up"}
            return up == set(ADDRESSES) and all(mounted_under(node.mount) for node in self.nodes)

        until(ready, "three nodes up and mounted", timeout_s)

    def _ctl(self, *args: str, **how: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIN / "ukai-ctl", *args], env=self.nodes[0].environment, text=True, check=False, **how)

    def ctl(self, *args: str) -> None:
        """Show a command and its output.  Raises DemoError when it fails."""
        print(f"$ ukai-ctl {' '.join(args)}", flush=True)
        if (code := self._ctl(*args).returncode) != 0:
            raise DemoError(f"ukai-ctl {args[0]} ended with exit code {code}")

    def ask(self, *args: str) -> Any:
        """What a command says with ``--json``.  Raises DemoError when it fails."""
        done = self._ctl(*args, "--json", capture_output=True)
        if done.returncode != 0:
            raise DemoError(f"ukai-ctl {args[0]} ended with exit code {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def image(self, name: str) -> dict[str, Any]:
        image: dict[str, Any] = self.ask("image", "show", name)["image"]
        return image

    def unavailable(self) -> set[str]:
        """The nodes that ``get_error_state`` lists."""
        return {node["address"] for node in self.ask("get_error_state")["nodes"]}

    def stop(self) -> list[str]:
        """End and unmount everything and remove the directory; returns what did not go by itself."""
        left: list[str] = []
        for where, _ in mounted_under(self.root):
            if where not in [node.mount for node in self.nodes]:
                with contextlib.suppress(DemoError):  # told below: it is still mounted
                    until(partial(_unmount, where), f"{where} unmounted", UNMOUNT_S)
        running = [node.supervisord for node in self.nodes if node.supervisord is not None]
        family: list[psutil.Process] = []
        for supervisord in running:
            supervisord.terminate()
        deadline = time.monotonic() + STOP_S
        while any(s.poll() is None for s in running) and time.monotonic() < deadline:
            psutil.wait_procs([psutil.Process(s.pid) for s in running if s.poll() is None], timeout=AGAIN_S)
            family = [p for s in running if s.poll() is None for p in psutil.Process(s.pid).children(recursive=True)]
            for process in family:
                # A signal that reached it between supervisord's fork and exec was lost there.
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        left += [f"supervisord {s.pid} did not end within {STOP_S:g} s" for s in running if s.poll() is None]
        for where, device in mounted_under(self.root):
            left.append(f"still mounted: {where}")
            abort = FUSE_CONNECTIONS / device.partition(":")[2] / "abort"
            if abort.exists():  # whoever waits in a mount that hangs gets an error, and can be ended
                abort.write_text("1")
            _unmount(where, "-l")
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("UKAI_RUN_DIR", "").startswith(str(self.root))
            except psutil.Error:
                ours = process in family
            if ours and process.pid != os.getpid():
                left.append(f"still running: {process.pid} {process.name()}")
                process.send_signal(signal.SIGKILL)
        for supervisord in running:
            supervisord.wait()
        shutil.rmtree(self.root, ignore_errors=True)
        return left

    def log_tails(self) -> str:
        return "\n".join(node.log_tails() for node in self.nodes)
