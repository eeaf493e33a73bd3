"""Who has what open on a node."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from ukai.blockd.coordinator import Coordinator, Handle
from ukai.blockd.core import Core
from ukai.blockd.frontends import FRONTEND_BEATS, Frontends
from ukai.blockd.writes import When
from ukai.errors import StaleHandle, StaleSession
from ukai.telemetry import Metrics

BEAT_S = 0.5


def test_a_handle_that_its_frontend_has_given_up_is_closed() -> None:
    """An open that was served after a freeze, when its asker had gone: the image must not be open for ever."""
    now = 100.0
    core = SimpleNamespace(now=lambda: now, config=SimpleNamespace(beat_interval=BEAT_S), inc="i")
    image = SimpleNamespace(uuid="u", name=lambda: "disk", idle_since=0.0, flusher=SimpleNamespace(lost="x"))
    frontends = Frontends(cast(Core, core))
    for number, frontend in ((1, "f"), (2, "f"), (3, "another")):
        frontends.handles[number] = Handle(number, frontend, cast(Coordinator, image), 0, now)

    def beat() -> object:
        replies: list[dict[str, object]] = []
        header = {"op": "beat", "frontend": "f", "handles": [1]}
        frontends.answer(header, None, lambda fields, _payload: replies.append(fields))
        return replies[0]["known"]

    assert beat() == [1]
    assert set(frontends.handles) == {1, 2, 3}, "its answer may still be under way"
    now += FRONTEND_BEATS * BEAT_S + 0.1
    assert beat() == [1]
    assert set(frontends.handles) == {1, 3}


@pytest.mark.expect_log(r"the frontend is silent")
def test_a_silent_frontend_may_live() -> None:
    """Its handles are closed, and count all the same: a role that moves meanwhile must make them stale (R2)."""
    now = 100.0
    heard: list[Callable[[], None]] = []
    ports = SimpleNamespace(take_in=lambda: [hear() for hear in heard])
    core = SimpleNamespace(now=lambda: now, config=SimpleNamespace(beat_interval=BEAT_S), inc="i", ports=ports)
    posts: list[str] = []
    image = SimpleNamespace(uuid="u", name=lambda: "disk", idle_since=0.0, flusher=SimpleNamespace(lost="x"))
    image.posts = posts
    frontends = Frontends(cast(Core, core))

    def beat() -> None:
        frontends.answer({"op": "beat", "frontend": "f", "handles": [1]}, None, lambda _fields, _payload: None)

    beat()
    frontends.handles[1] = Handle(1, "f", cast(Coordinator, image), 0, now)
    now += FRONTEND_BEATS * BEAT_S + 0.1
    heard.append(lambda: posts.append("a write"))
    frontends.drop_silent()
    assert frontends.handles, "what it has posted is not done yet"
    posts.clear()
    heard[:] = [beat]
    frontends.drop_silent()
    assert frontends.handles, "this process was frozen, and not the frontend"
    heard.clear()
    now += FRONTEND_BEATS * BEAT_S + 0.1
    frontends.drop_silent()
    assert not frontends.handles
    assert frontends.opens() == {"u": 1}
    assert image.flusher.lost == "x", "its machine has not been told that its writes are gone (R7)"
    beat()
    assert frontends.opens() == {}


@pytest.mark.parametrize(
    ("fields", "stored", "clean", "said"),
    [
        ({"s": True}, When.NOW, True, True),
        ({"s": True, "f": True}, When.NOW, False, False),
        ({"s": False, "f": True}, When.SOON, True, True),
        ({"s": False, "f": True}, When.SOON, False, False),
        ({"s": False, "f": 1}, When.LATER, True, False),
        ({}, When.LATER, True, False),
    ],
)
def test_only_a_write_that_is_flushed_on_the_way_says_that_nothing_is_left_to_flush(
    fields: dict[str, object], stored: When, clean: bool, said: bool
) -> None:
    """The frontend then answers the fsync by itself (R7).  Any other says whether the next may be posted."""
    written: list[tuple[int, bytes, When]] = []

    def write(_handle: object, offset: int, data: bytes, _length: int, stored: When, done: Callable[..., None]) -> None:
        written.append((offset, data, stored))
        done(None)

    image = SimpleNamespace(
        name=lambda: "disk",
        writes=SimpleNamespace(write=write),
        flusher=SimpleNamespace(clean=lambda: clean),
        posts=SimpleNamespace(welcome=lambda offset: offset == 5 and clean),
    )
    core = SimpleNamespace(now=lambda: 1.0, inc="i", stopping=False, metrics=Metrics())
    frontends = Frontends(cast(Core, core))
    frontends.handles[1] = Handle(1, "f", cast(Coordinator, image), 0, 1.0)
    replies: list[dict[str, object]] = []
    header = {"op": "w", "inc": "i", "h": 1, "o": 5, **fields}
    frontends.answer(header, b"data", lambda fields, _payload: replies.append(fields))
    assert written == [(5, b"data", stored)]
    post = {"post": True} if clean and stored is When.LATER else {}
    assert replies == [{"clean": True} if said else post]


@pytest.mark.parametrize(("replication", "told"), [("sync", {}), ("flush", {"err": "stale-handle"})])
def test_an_fsync_of_a_stale_handle_says_nothing_of_writes_that_may_be_gone(
    replication: str, told: dict[str, object]
) -> None:
    """The node has the role again, for another machine, and nothing to flush (R2, R7)."""

    def check_handle(_handle: Handle) -> None:
        raise StaleHandle("taken over")

    image = SimpleNamespace(
        name=lambda: "disk",
        image=SimpleNamespace(replication=replication),
        check_handle=check_handle,
        flusher=SimpleNamespace(clean=lambda: True),
    )
    core = SimpleNamespace(now=lambda: 1.0, inc="i", stopping=False, metrics=Metrics())
    frontends = Frontends(cast(Core, core))
    frontends.handles[1] = Handle(1, "f", cast(Coordinator, image), 0, 1.0)
    replies: list[dict[str, object]] = []
    frontends.answer({"op": "f", "inc": "i", "h": 1}, None, lambda fields, _payload: replies.append(fields))
    assert [{k: v for k, v in fields.items() if k == "err"} for fields in replies] == [told]


def test_what_a_closed_handle_has_under_way_goes_no_further() -> None:
    """Thawed when its machine was stopped, it would take the role from one that runs elsewhere (seed 2837)."""
    core = SimpleNamespace(frontends=SimpleNamespace(handles={}))
    image = SimpleNamespace(core=core, own="n", image=SimpleNamespace(lost={}), name=lambda: "disk")
    handle = Handle(1, "f", cast(Coordinator, image), 3, 0.0)
    core.frontends.handles[1] = handle
    Coordinator.check_handle(cast(Coordinator, image), handle)
    core.frontends.handles[1] = Handle(1, "f", cast(Coordinator, image), 3, 1.0)
    with pytest.raises(StaleSession, match="was closed"):
        Coordinator.check_handle(cast(Coordinator, image), handle)
