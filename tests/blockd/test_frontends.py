"""Who has what open on a node."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from ukai.blockd.coordinator import Coordinator, Handle
from ukai.blockd.core import Core
from ukai.blockd.frontends import FRONTEND_BEATS, Frontends

BEAT_S = 0.5


def test_a_handle_that_its_frontend_has_given_up_is_closed() -> None:
    """An open that was served after a freeze, when its asker had gone: the image must not be open for ever."""
    now = 100.0
    core = SimpleNamespace(now=lambda: now, config=SimpleNamespace(beat_interval=BEAT_S), inc="i")
    image = SimpleNamespace(name=lambda: "disk", idle_since=0.0, flusher=SimpleNamespace(lost="x"))
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
