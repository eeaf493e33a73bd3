"""A cluster of real processes on this machine: 127.0.0.1, 127.0.0.2 … are its nodes.

The verbs are those of an operator and of fate: start, kill, freeze, restart, ask, compare the replicas.  Nothing here
sleeps for a guess: every wait is for a condition and has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from tests import machine
from tests.blocks import Difference, differences
from tests.logs import LogFile, LogLine
from tests.machine import PortRange, wait_for
from tests.mesh import Mesh, MeshPorts
from ukai import messages

PROCESSES = ("metad", "blockd", "frontend")
READY_S = 30.0
END_S = 20.0

DEFAULTS: dict[str, object] = {
    "replica_timeout": 3,
    "io_timeout": 20,
    "lease": 4,
    "beat_interval": 0.5,
    "role_linger": 0.5,
    "metrics_interval": 0.5,
    "log_format": "json",
}

LIVE: list[Cluster] = []
"""Clusters whose logs are still to be looked at by the log checker, oldest first."""


class CtlError(AssertionError):
    """``ukai-ctl`` ended with another exit code than 0."""

    def __init__(self, args: Sequence[str], code: int, stderr: str) -> None:
        super().__init__(f"ukai-ctl {' '.join(args)}: exit code {code}: {stderr.strip()}")
        self.code, self.stderr = code, stderr


class Process:
    """One daemon on one node, over all its lives.  ``popen`` is None while it is not meant to run."""

    def __init__(self, node: str, name: str, env: Mapping[str, str], log: Path, command: Sequence[str] = ()) -> None:
        self.node, self.name, self.env = node, name, env
        self.command = command or [program(f"ukai-{name}")]
        self.log = LogFile(log)
        self.popen: subprocess.Popen[bytes] | None = None
        self.stopped = False

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    @property
    def pid(self) -> int:
        assert self.popen is not None, f"{self} does not run"
        return self.popen.pid

    def start(self) -> None:
        assert not self.alive, f"{self} runs already"
        self.stopped = False
        with self.log.path.open("ab") as out:
            self.popen = subprocess.Popen(
                self.command,
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        assert self.alive, f"{self} does not run"
        os.kill(self.pid, number)
        self.stopped = number == signal.SIGSTOP

    def wait(self, timeout_s: float = END_S) -> int:
        """The exit code; afterwards the process is not meant to run.  Raises AssertionError after ``timeout_s``."""
        assert self.popen is not None, f"{self} does not run"
        try:
            code = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} did not end within {timeout_s:g} s; its log: {self.log.tail()}") from None
        self.popen = None
        return code

    def __str__(self) -> str:
        return f"{self.name} of {self.node}"


class Cluster:
    """Nodes 1 … ``nodes``; metad on node 1, blockd on each or on those in ``blockds``, a frontend on ``frontends``.

    ``settings`` are keys of ``ukai.config``, over ``DEFAULTS``.  With a ``mesh`` its hosts are the nodes, and it stays
    the caller's.  ``commands`` are programs in the place of ``ukai-NAME``.  A context manager: ``with`` starts all and
    waits until they are ready; the end compares nothing, stops all, and raises AssertionError with what was left
    behind.
    """

    def __init__(
        self,
        root: Path,
        nodes: int = 3,
        frontends: Sequence[int] = (1,),
        binding: str = "auto",
        settings: Mapping[str, object] | None = None,
        blockds: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        commands: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.root, self.mesh, self.commands = root, mesh, commands or {}
        self.addresses = mesh.addresses if mesh is not None else [f"127.0.0.{n}" for n in range(1, nodes + 1)]
        self.frontends = [self.node(n) for n in frontends]
        self.blockds = self.addresses if blockds is None else [self.node(n) for n in blockds]
        self.ports: PortRange | MeshPorts = MeshPorts() if mesh is not None else PortRange(self.addresses, 6)
        self.run_root = Path(tempfile.mkdtemp(prefix="ukai-", dir="/tmp"))  # short: socket paths hold 107 bytes
        self._allowed: list[re.Pattern[str]] = []
        (root / "log").mkdir(parents=True)
        (root / "ukai.toml").write_text("# all settings come from the environment\n")
        base = self.ports.first
        self.settings: dict[str, object] = {
            **DEFAULTS,
            "metad_address": self.addresses[0],
            "metadata_root": root / "metadata",
            "fuse_binding": binding,
            "control_port": base,
            "proxy_port": base + 1,
            "publish_port": base + 2,
            "metad_events_port": base + 3,
            "blockd_events_port": base + 4,
            "frontend_events_port": base + 5,
            **(settings or {}),
        }
        self.processes: dict[tuple[str, str], Process] = {}
        for address in self.addresses:
            for name in PROCESSES:
                where = {"metad": self.addresses[:1], "blockd": self.blockds, "frontend": self.frontends}[name]
                if address not in where:
                    continue
                log = root / "log" / f"{address}-{name}.log"
                env = self.environment(address)
                self.processes[address, name] = Process(address, name, env, log, self.command(address, f"ukai-{name}"))
        LIVE.append(self)

    # -- who and where

    def node(self, node: int | str) -> str:
        """The address of a node, from its number (1 is the first) or its address."""
        return self.addresses[node - 1] if isinstance(node, int) else node

    def command(self, node: int | str, name: str) -> list[str]:
        """A console script of ours, or what stands in its place, as it is called on a node."""
        where = [] if self.mesh is None else self.mesh.command(self.addresses.index(self.node(node)) + 1)
        return [*where, *self.commands.get(name.removeprefix("ukai-"), [program(name)])]

    def environment(self, node: int | str) -> dict[str, str]:
        """The environment of the processes of a node."""
        address = self.node(node)
        env = {k: v for k, v in os.environ.items() if not k.startswith("UKAI_")}
        for key, value in self.settings.items():
            env[f"UKAI_{key.upper()}"] = str(value)
        env |= {
            "UKAI_CONFIG": str(self.root / "ukai.toml"),
            "UKAI_NODE_ADDRESS": address,
            "UKAI_DATA_ROOT": str(self.data_root(address)),
            "UKAI_RUN_DIR": str(self.run_root / address),
            "UKAI_MOUNT_POINT": str(self.mount(address)),
            "PYTHONSAFEPATH": "1",  # UKAI as it is installed, not what lies in the tree
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "default",  # they end in the log, and the log is checked
        }
        return env

    def process(self, node: int | str, name: str) -> Process:
        return self.processes[self.node(node), name]

    def data_root(self, node: int | str) -> Path:
        return self.root / self.node(node) / "data"

    def mount(self, node: int | str) -> Path:
        """The mount point of a node's frontend."""
        return self.root / self.node(node) / "mnt"

    def path(self, image: str, node: int | str = 1) -> Path:
        """An image as a node's hypervisor sees it."""
        return self.mount(node) / image

    # -- life and death

    def __enter__(self) -> Self:
        try:
            self.start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faults = self.close()
        if faults and kind is None:
            raise AssertionError("; ".join(faults))

    def start_all(self) -> None:
        """Start what does not run, in no order that helps, and wait until all are ready."""
        for process in reversed(self.processes.values()):
            if not process.alive:
                process.popen = None
                process.start()
        self.wait_ready()

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Until metad answers, every running blockd is up and every running frontend has its mount."""
        expected = {p.node for p in self.processes.values() if p.name == "blockd" and p.alive and not p.stopped}

        def nodes_up() -> bool:
            self._check_alive()
            reply = self.try_ask("node.list")
            return reply is not None and expected <= {n["address"] for n in reply["nodes"] if n["state"] == "up"}

        wait_for(nodes_up, f"blockd of {', '.join(sorted(expected))} registered", timeout_s, self.tails)
        for process in self.processes.values():
            if process.name == "frontend" and process.alive and not process.stopped:
                self.wait_mounted(process.node, timeout_s)

    def wait_mounted(self, node: int | str, timeout_s: float = READY_S) -> None:
        """Until a node's mount is there and answers."""
        where = self.mount(node)

        def mounted() -> bool:
            self._check_alive()
            return machine.mount_answers(where)

        wait_for(mounted, f"a mount at {where}", timeout_s, self.tails)

    def _check_alive(self) -> None:
        for process in self.processes.values():
            if process.popen is not None and not process.alive:
                raise AssertionError(f"{process} ended with {process.popen.returncode}: {process.log.tail()}")

    def start(self, node: int | str, name: str, ready: bool = True) -> None:
        self.process(node, name).start()
        if ready:
            self.wait_ready()

    def kill(self, node: int | str, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal that ends the process, and wait for its end.  Returns the exit code."""
        process = self.process(node, name)
        process.signal(number)
        return process.wait()

    def kill_all(self) -> None:
        """SIGKILL for all processes of all nodes, as near to one instant as can be."""
        running = [p for p in self.processes.values() if p.alive]
        for process in running:
            process.signal(signal.SIGKILL)
        for process in running:
            process.wait()

    def stop(self, node: int | str, name: str) -> None:
        """Freeze the process (SIGSTOP): its sockets stay, it answers nothing."""
        process = self.process(node, name)
        process.signal(signal.SIGSTOP)
        wait_for(lambda: machine.process_state(process.pid) == "T", f"{process} frozen", 5)

    def cont(self, node: int | str, name: str) -> None:
        """Let a frozen process go on."""
        self.process(node, name).signal(signal.SIGCONT)

    def restart(self, node: int | str, name: str, number: int = signal.SIGTERM, ready: bool = True) -> None:
        code = self.kill(node, name, number)
        assert code == (-number if number == signal.SIGKILL else 0), f"{name} of {self.node(node)} ended with {code}"
        self.start(node, name, ready)

    def heal(self) -> None:
        """All processes run again and are ready, whatever was done to them."""
        for process in self.processes.values():
            if process.alive and process.stopped:
                process.signal(signal.SIGCONT)
        self.start_all()

    def close(self) -> list[str]:
        """Stop all and clean up; returns one line for each thing that did not end or was left behind."""
        faults: list[str] = []
        for name in reversed(PROCESSES):
            if name == "blockd":
                self._await_release()
            mine = [p for p in self.processes.values() if p.name == name and p.popen is not None]
            for process in mine:
                if process.alive:
                    if process.stopped:
                        process.signal(signal.SIGCONT)
                    process.signal(signal.SIGTERM)
                else:
                    faults.append(f"{process} had ended by itself")
            for process in mine:
                try:
                    if (code := process.wait()) != 0:
                        faults.append(f"{process} ended with {code} on SIGTERM: {process.log.tail()}")
                except AssertionError as e:
                    faults.append(str(e))
                    if name == "frontend":
                        machine.abort_fuse(self.mount(process.node))
                    process.signal(signal.SIGKILL)
                    process.wait()
        for what, end in machine.left_behind(self.root, self.run_root, self.ports):
            faults.append(what)
            end()
        self.ports.close()
        shutil.rmtree(self.run_root, ignore_errors=True)
        return faults

    def _await_release(self) -> None:
        """Let the writers flush and release while their replicas still live: no frontend is left to want the role."""
        if not all(p.alive and not p.stopped for p in self.processes.values() if p.name != "frontend"):
            return

        def released() -> bool:
            reply = self.try_ask("image.list")
            return reply is not None and not any(image["writer"] for image in reply.get("images", []))

        with contextlib.suppress(AssertionError):  # what it leads to is in the logs
            wait_for(released, "no image with a writer", END_S)

    # -- asking

    def ctl(self, *args: str, timeout_s: float = 60.0) -> Any:
        """Run ``ukai-ctl ARGS --json`` and return what it printed, decoded.  Raises CtlError at another code than 0."""
        done = self.ctl_run(*args, "--json", timeout_s=timeout_s)
        if done.returncode != 0:
            raise CtlError(args, done.returncode, done.stderr)
        return json.loads(done.stdout) if done.stdout.strip() else None

    def ctl_run(
        self, *args: str, timeout_s: float = 60.0, node: int | str = 1, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``ukai-ctl ARGS`` as an administrator on a node would."""
        return subprocess.run(
            [*self.command(node, "ukai-ctl"), *args],
            env={**self.environment(node), "COLUMNS": "200"},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ask(self, op: str, timeout_s: float = 10.0, **fields: object) -> dict[str, Any]:
        """One request to metad over its control port, without a process in between.  Raises UkaiError."""
        reply = self.try_ask(op, timeout_s, **fields)
        assert reply is not None, f"metad did not answer {op} within {timeout_s:g} s"
        messages.raise_error(reply)
        return reply

    def try_ask(self, op: str, timeout_s: float = 2.0, **fields: object) -> dict[str, Any] | None:
        """As ``ask``; None when nobody answers in time."""
        there = contextlib.nullcontext() if self.mesh is None else self.mesh.inside(1)
        with there, zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.set(zmq.REQ_CORRELATE, 1)
            socket.set(zmq.REQ_RELAXED, 1)
            socket.connect(f"tcp://{self.addresses[0]}:{self.settings['control_port']}")
            socket.send(messages.pack({"op": op, "id": 1, "timeout": timeout_s, **fields}))
            if not socket.poll(int(timeout_s * 1000)):
                return None
            return messages.unpack(socket.recv_multipart()[0])

    def image(self, name: str) -> dict[str, Any]:
        """What metad knows of an image, with its placement."""
        found: dict[str, Any] = self.ask("image.show", name=name)["image"]
        return found

    def images(self) -> list[str]:
        return [image["name"] for image in self.ask("image.list")["images"]]

    def wait_image(self, name: str, health: str, timeout_s: float = 30.0) -> None:
        """Until the image's health is ``ok``, ``degraded``, ``syncing`` or ``offline``."""
        wait_for(lambda: self.image(name)["health"] == health, f"{name} {health}", timeout_s, self.tails)

    # -- the data

    def compare_replicas(self, image: str | None = None) -> int:
        """Compare all in-sync copies of every block, of one image or of all.  Returns how many copies were read.

        Raises AssertionError that names the blocks and nodes that differ.  Active blocks of a writer that is gone
        are left out: they may differ until the next grant (R5).
        """
        copies, found = 0, list[Difference]()
        for name in [image] if image is not None else self.images():
            while True:
                before = self.image(name)
                count, different = differences(before, {n: self.data_root(n) for n in self.addresses}, self._block_name)
                after = self.image(name)
                if after["placement"] == before["placement"] and after["active"] == before["active"]:
                    break
            copies += count
            found += different
        assert not found, "in-sync copies differ: " + "; ".join(map(str, found[:10]))
        return copies

    def _block_name(self, index: int) -> str:
        return str(self.settings.get("blockname_format", "%016d")) % index

    # -- the logs

    def expect_log(self, pattern: str) -> None:
        """Lines of level warning or above that match are wanted from now on and before."""
        self._allowed.append(re.compile(pattern))

    def wait_log(self, pattern: str, timeout_s: float = 30.0) -> LogLine:
        """Until some process has logged a line that matches; it is then no fault either."""
        self.expect_log(pattern)
        wanted = re.compile(pattern)

        def found() -> LogLine | None:
            return next((line for line in self.log_lines() if wanted.search(line.message)), None)

        return wait_for(found, f"a log line like {pattern!r}", timeout_s, self.tails)

    def log_lines(self) -> Iterator[LogLine]:
        for process in self.processes.values():
            yield from process.log.lines()

    def undeclared_log_lines(self, allowed: Sequence[re.Pattern[str]] = ()) -> list[LogLine]:
        """New lines of level warning or above, since the last call, that nobody declared."""
        patterns = [*self._allowed, *allowed]
        return [
            line
            for process in self.processes.values()
            for line in process.log.news()
            if line.serious and not any(p.search(line.message) for p in patterns)
        ]

    def tails(self) -> str:
        """The last lines of all logs, for a message."""
        return "\n".join(f"{process}: {process.log.tail()}" for process in self.processes.values())


def program(name: str) -> str:
    """A console script of the environment that runs the tests, of what lies in the tree (compiled)."""
    machine.check_installed()
    return str(Path(sys.executable).with_name(name))
