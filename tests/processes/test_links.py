"""Messages that come late, twice, or not at all between real processes (R4, R6), and cuts of one way only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.machine import wait_for
from tests.processes import routed
from tests.processes.guest import QUICK, Recorder, create, in_sync, out_of_sync, wait_shown, write_at
from tests.processes.ledger import Ledger
from tests.processes.sample import sample
from tests.proxy import Proxy

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log(r"")]

ONE, TWO, THREE = "127.0.0.1", "127.0.0.2", "127.0.0.3"
METAD = "metad"
PLACE = 4096
"""In block 0, where no recorder writes."""
SETTINGS: dict[str, object] = {
    **QUICK, "io_timeout": 8, "active_limit": 4, "active_idle": 0.5, "active_age": 3, "sync_chunk": 64 << 10,
}  # fmt: skip
HOLD_S = 60.0
"""How long a message is held in the campaign; ``make test`` holds it until the resync is over."""


class ProxiedCluster(Cluster):
    """Every connection to metad and between blockds goes through the proxy; a node's processes have one name."""

    def __init__(self, root: Path, proxy: Proxy, **more: Any) -> None:
        self.proxy = proxy
        super().__init__(root, **more)

    def environment(self, node: int | str) -> dict[str, str]:
        own, control = self.node(node), f"tcp://{self.addresses[0]}:{self.settings['control_port']}"
        publish = f"tcp://{self.addresses[0]}:{self.settings['publish_port']}"
        routes = {
            control: self.proxy.link(own, METAD, control),
            publish: self.proxy.publisher(own, METAD, publish),
        }
        for other in self.addresses:
            if other != own:
                endpoint = f"tcp://{other}:{self.settings['proxy_port']}"
                routes[endpoint] = self.proxy.link(own, other, endpoint)
        return {**super().environment(node), "UKAI_TEST_ROUTES": json.dumps(routes)}

    def command(self, node: int | str, name: str) -> list[str]:
        if name in ("ukai-blockd", "ukai-frontend"):
            return [sys.executable, str(routed.__file__), name.removeprefix("ukai-")]
        return super().command(node, name)


class Stage:
    """One cluster for all cases."""

    def __init__(self, root: Path, proxy: Proxy) -> None:
        self.proxy = proxy
        self.cluster = ProxiedCluster(root / "cluster", proxy, nodes=3, frontends=(1, 3), settings=SETTINGS)
        self.ledger = Ledger(root)

    def disk(self, node: int = 1) -> Path:
        return self.cluster.path("disk", node)

    def settle(self, crashes: int = 0) -> None:
        in_sync(self.cluster, "disk")
        assert self.cluster.compare_replicas("disk") == 32
        for node in (1, 3):
            wait_shown(self.cluster, "disk", node)
            self.ledger.check(self.disk(node), crashes)
            crashes = 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Proxy() as proxy:
        one = Stage(tmp_path_factory.mktemp("links"), proxy)
        try:
            one.cluster.start_all()
            create(one.cluster, hypervisors=(1, 3))
            yield one
        finally:
            faults = one.cluster.close()
    assert not faults, "; ".join(faults)


def test_a_write_held_until_after_the_resync_is_refused(stage: Stage) -> None:
    """It arrives when newer data are there, and must change nothing (R6)."""
    old, new = os.urandom(4096), os.urandom(4096)
    write_at(stage.disk(), PLACE, bytes(4096))
    held = stage.proxy.rule("hold", "w", client=ONE, server=TWO, to_server=True)
    write_at(stage.disk(), PLACE, old)
    held.wait_met()
    assert out_of_sync(stage.cluster, "disk", 2) == {0}
    in_sync(stage.cluster, "disk")
    write_at(stage.disk(), PLACE, new)
    _refused(stage, held)
    stage.settle()
    assert _block(stage, 2, 4096) == new == _block(stage, 1, 4096)


@pytest.mark.slow
@pytest.mark.campaign
def test_a_write_held_for_a_minute_is_refused(stage: Stage) -> None:
    held = stage.proxy.rule("hold", "w", client=ONE, server=TWO, to_server=True)
    with stage.ledger.start(stage.disk()) as guest:
        met = held.wait_met()
        in_sync(stage.cluster, "disk")
        begun = guest.written
        wait_for(lambda: guest.written > begun and len(held.met) == 1, "the guest going on", 20)
        with pytest.raises(AssertionError, match="in vain"):
            wait_for(lambda: guest.popen.poll() is not None, "nothing, for a minute", HOLD_S)
        assert met is held.met[0]
        _refused(stage, held)
        guest.wait_written(20)
        guest.end()
    stage.settle()


def _refused(stage: Stage, held: Any) -> None:
    """Let a held message go and see that its server says no."""
    answer = stage.proxy.rule("hold", "w", client=ONE, server=TWO, to_server=False, count=-1)
    wanted = held.met[0].header["id"]
    stage.proxy.release(held)

    def refused() -> bool:
        return any(m.header.get("re") == wanted and m.header.get("err") == "stale-session" for m in answer.met)

    wait_for(refused, "the refusal of the late write", 10)
    stage.proxy.release(answer)


def _block(stage: Stage, node: int, length: int) -> bytes:
    with (stage.cluster.data_root(node) / "disk" / f"{0:016d}").open("rb") as file:
        return os.pread(file.fileno(), length, PLACE)


PEER_OPS = ("w", "ws", "g", "f", "r", "h", "k", "d", "hello", "ping", "fence")
METAD_OPS = ("activate", "retire", "mark", "beat", "grant", "grant.commit", "release", "sync.begin", "sync.finish",
             "job.end", "register", "catchup")  # fmt: skip
ACTIONS = ("drop request", "drop reply", "repeat request", "delay request", "delay reply")
CASES = [(TWO, op, action) for op in PEER_OPS for action in ACTIONS if op != "r"] + [
    (METAD, op, action) for op in METAD_OPS for action in ACTIONS
]


@pytest.mark.parametrize(("server", "op", "action"), sample(CASES, 6), ids=lambda v: str(v).replace(" ", "-"))
def test_a_message_that_is_lost_late_or_twice(stage: Stage, server: str, op: str, action: str) -> None:
    """The guest's write is answered in its time; what was told is there, and all comes in sync again.

    What leads to each kind of message: a guest that writes, a replica that is killed and comes back, a resync.
    """
    what, which = action.split()
    # a node catches up when an image is opened there of which it is not the writer
    wait_for(lambda: not stage.cluster.image("disk")["writer"], "the role given back", 20, stage.cluster.tails)
    rule = stage.proxy.rule(
        what, op, client=ONE if server != METAD or op != "register" else TWO, server=server,
        to_server=which == "request", delay_s=1.0,
    )  # fmt: skip
    with stage.ledger.start(stage.disk()) as guest:
        guest_wrote(guest, 20)
        stage.cluster.kill(2, "blockd")
        guest_wrote(guest, 10)
        stage.cluster.start(2, "blockd", ready=False)
        guest_wrote(guest, 10)
        crashes = _end(guest)
    stage.cluster.wait_ready()
    in_sync(stage.cluster, "disk")
    wait_for(lambda: not stage.cluster.image("disk")["writer"], "the role given back", 20, stage.cluster.tails)
    rule.wait_met()
    stage.proxy.end(rule)
    stage.settle(crashes)


def guest_wrote(guest: Recorder, more: int) -> None:
    """So many writes, or an error after the time that a write may take."""
    goal = guest.written + more
    wait_for(lambda: guest.written >= goal or guest.popen.poll() is not None, f"{more} writes answered", 25)


def _end(guest: Recorder) -> int:
    if guest.popen.poll() is None:
        guest.popen.terminate()
    return 1 if guest.popen.wait(20) else 0


ENDS = [(ONE, TWO), (TWO, ONE), (ONE, METAD), (METAD, ONE), (TWO, METAD), (METAD, TWO)]


@pytest.mark.parametrize(("a", "b"), sample(ENDS, 2))
def test_nothing_goes_one_way(stage: Stage, a: str, b: str) -> None:
    """From one to the other nothing goes, the way back is free: as bad as a cut, and no worse."""
    with stage.ledger.start(stage.disk()) as guest:
        guest_wrote(guest, 20)
        cut = stage.proxy.cut(a, b, one_way=True)
        guest_wrote(guest, 10)
        wait_for(lambda: any(rule.met for rule in cut), "something that is lost", 20)
        stage.proxy.end(*cut)
        crashes = _end(guest)
    stage.cluster.wait_ready()
    stage.settle(crashes)
