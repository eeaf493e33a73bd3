"""The connection to another node: when a session ends all that was under way has failed, and nothing comes late."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from ukai.blockd.peer import (
    DOWN,
    GREETING,
    LEISURE_BYTES,
    LEISURE_S,
    LEISURE_WRITES,
    SLOW_OPS,
    UP,
    Payload,
    Peer,
)
from ukai.errors import Behind, Damaged, NoSpace, NotReady, StaleEpoch, StaleSession, UkaiError, Unreachable
from ukai.messages import Header, error_reply, pack, unpack

NODE, OWN = "192.0.2.2", "192.0.2.1"
REPLICA_TIMEOUT_S, IO_TIMEOUT_S, BEAT_S = 4.0, 30.0, 1.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while something is ready, and jumps to the next timer when nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0].cancelled():
            heapq.heappop(timers)._scheduled = False  # type: ignore[attr-defined]
        if timers and not self._ready:  # type: ignore[attr-defined]
            self.now_s = max(self.now_s, timers[0].when())
        super()._run_once()  # type: ignore[misc]


def run(story: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(asyncio.wait_for(story, 3600))


class Wire:
    """One connection as the transport has it; the test plays the replica behind it."""

    def __init__(self, net: Net, received: Callable[[Header, Payload | None], None], lost: Callable[[], None]) -> None:
        self.net, self._received, self.lost = net, received, lost
        self.sent: list[Header] = []
        self.payloads: list[Payload | None] = []
        """Of each of these."""
        self.closed = False
        self.accepts = True

    def send(self, header: Header, payload: Payload | None) -> bool:
        if self.closed or not self.accepts or not self.net.reachable:
            return False
        header = unpack(pack(dict(header)))
        self.sent.append(header)
        self.payloads.append(payload)
        self.net.arrived.set()
        answer = self.net.answers(self, header)
        if answer is not None:
            asyncio.get_running_loop().call_soon(self.reply, header, answer)
        return True

    def reply(self, header: Header, answer: Header, payload: Payload | None = None) -> None:
        self._received({**answer, "re": header["id"]}, payload)

    def close(self) -> None:
        self.closed = True

    def of(self, op: str) -> list[Header]:
        return [h for h in self.sent if h["op"] == op]


class Net:
    """Everything around a peer."""

    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.reachable = True
        self.hello: Callable[[], Header | None] = lambda: {"token": len(self.wires) * 100, "registered_seq": 7}
        self.ping: Callable[[], Header | None] = lambda: {"stale": {}}
        self.arrived = asyncio.Event()
        self.caught_up: list[int] = []
        self.catch_up: Callable[[int], Awaitable[None]] = self._catch_up
        self.stale: list[tuple[str, int]] = []
        self.rebooted: list[str] = []
        self.wall_s = 50.0
        self.peer = Peer(
            NODE,
            OWN,
            "own-inc",
            self.connect,
            replica_timeout_s=REPLICA_TIMEOUT_S,
            io_timeout_s=IO_TIMEOUT_S,
            beat_interval_s=BEAT_S,
            catch_up=lambda seq: self.catch_up(seq),
            roles=lambda: {"u": 3},
            on_reboot=self.rebooted.append,
            on_stale=lambda uuid, epoch: self.stale.append((uuid, epoch)),
            wall=lambda: self.wall_s,
        )

    def connect(self, node: str, received: Callable[[Header, Payload | None], None], lost: Callable[[], None]) -> Wire:
        assert node == NODE
        self.wires.append(Wire(self, received, lost))
        return self.wires[-1]

    def answers(self, wire: Wire, header: Header) -> Header | None:
        if header["op"] == "hello":
            return self.hello()
        if header["op"] == "ping":
            return self.ping()
        return None

    async def _catch_up(self, seq: int) -> None:
        self.caught_up.append(seq)

    @property
    def wire(self) -> Wire:
        return self.wires[-1]

    async def up(self) -> Wire:
        assert await self.peer.settled()
        return self.wire

    async def until(self, condition: Callable[[], bool], timeout_s: float = 100.0) -> float:
        """Seconds until it is so."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while not condition():
            assert loop.time() - begin < timeout_s, "it did not come about"
            await asyncio.sleep(0.001)
        return loop.time() - begin


class Outcome:
    """What became of one numbered request."""

    def __init__(self) -> None:
        self.got: list[tuple[UkaiError | None, Header]] = []

    def __call__(self, error: UkaiError | None, header: Header, payload: Payload | None) -> None:
        self.got.append((error, header))

    @property
    def code(self) -> str:
        assert len(self.got) == 1, "exactly one outcome for each request"
        error = self.got[0][0]
        return error.code if error is not None else "done"


def with_net(story: Callable[[Net], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        net = Net()
        try:
            await story(net)
        finally:
            net.peer.close()

    run(whole())


def test_a_session_begins_with_hello_and_the_metadata_of_the_replica() -> None:
    async def story(net: Net) -> None:
        assert net.peer.state == DOWN
        assert not net.peer.numbered({"op": "w"}, b"x", Outcome())
        wire = await net.up()
        assert wire.sent[0]["op"] == "hello"
        assert (wire.sent[0]["node"], wire.sent[0]["inc"]) == (OWN, "own-inc")
        assert net.caught_up == [7]
        assert net.peer.state == UP

    with_net(story)


def test_it_is_not_up_before_the_metadata_is_new_enough() -> None:
    async def story(net: Net) -> None:
        gate = asyncio.Event()

        async def later(seq: int) -> None:
            await gate.wait()

        net.catch_up = later
        await net.until(lambda: bool(net.wires and net.wire.of("hello")))
        await asyncio.sleep(1)
        assert net.peer.state == GREETING
        assert not net.peer.numbered({"op": "w"}, b"x", Outcome())
        with pytest.raises(Unreachable):
            await net.peer.ask("r", {})
        assert [h["op"] for h in net.wire.sent] == ["hello"]
        gate.set()
        assert await net.peer.settled()

    with_net(story)


def test_requests_carry_the_token_and_numbers_from_zero() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [Outcome() for _ in range(3)]
        for outcome in outcomes:
            assert net.peer.numbered({"op": "w"}, b"data", outcome)
        assert net.peer.inflight_bytes == 12
        asked = asyncio.create_task(net.peer.ask("r", {"i": "u"}))
        await net.until(lambda: bool(wire.of("r")))
        assert [(h["t"], h["n"]) for h in wire.of("w")] == [(100, 0), (100, 1), (100, 2)]
        assert wire.of("r")[0]["t"] == 100
        assert "n" not in wire.of("r")[0]
        assert all(h["t"] == 100 for h in wire.of("ping"))
        for n in (2, 0, 1):
            wire.reply(wire.of("w")[n], {})
        assert [o.code for o in outcomes] == ["done"] * 3
        assert net.peer.inflight_bytes == 0
        wire.reply(wire.of("r")[0], {"x": 1}, b"payload")
        assert await asked == ({"x": 1, "re": wire.of("r")[0]["id"]}, b"payload")

    with_net(story)


@pytest.mark.parametrize(
    ("op", "patience_s"), [("w", REPLICA_TIMEOUT_S), ("z", REPLICA_TIMEOUT_S), ("g", 15.0), ("f", 15.0)]
)
def test_a_request_without_an_answer_in_time_ends_the_session(op: str, patience_s: float) -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        await asyncio.sleep(0.3)
        outcome, other = Outcome(), Outcome()
        net.peer.numbered({"op": op}, b"data" * 100, outcome)
        net.peer.numbered({"op": "f"}, None, other)
        assert (op in SLOW_OPS) == (patience_s > REPLICA_TIMEOUT_S)
        took_s = await net.until(lambda: bool(outcome.got))
        assert took_s == pytest.approx(patience_s, abs=0.05)
        assert outcome.code == other.code == "unreachable"
        assert "no answer within" in outcome.got[0][0].message  # type: ignore[union-attr]
        assert wire.closed
        assert net.peer.inflight_bytes == 0

    with_net(story)


def test_a_frozen_node_is_found_by_the_ping_while_a_slow_request_waits() -> None:
    async def story(net: Net) -> None:
        await net.up()
        outcome = Outcome()
        net.peer.numbered({"op": "f"}, None, outcome)
        net.ping = lambda: None
        assert await net.until(lambda: bool(outcome.got)) < REPLICA_TIMEOUT_S + BEAT_S + 0.1
        assert outcome.code == "unreachable"

    with_net(story)


def test_the_end_of_a_session_fails_all_in_flight_at_once_and_what_asks_meanwhile() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [Outcome() for _ in range(10)]
        late = Outcome()

        def again(error: UkaiError | None, header: Header, payload: Payload | None) -> None:
            assert not net.peer.numbered({"op": "w"}, b"x", late)

        net.peer.numbered({"op": "w"}, b"x", again)
        for outcome in outcomes:
            net.peer.numbered({"op": "w"}, b"x", outcome)
        asks = [asyncio.create_task(net.peer.ask("r", {})) for _ in range(3)]
        await net.until(lambda: len(wire.of("r")) == 3)
        net.peer.fail("cut")
        assert [o.code for o in outcomes] == ["unreachable"] * 10
        assert not late.got
        for ask in asks:
            with pytest.raises(Unreachable, match="cut"):
                await ask
        assert net.peer.reason == "cut"

    with_net(story)


def test_what_is_under_way_fails_as_soon_as_its_connection_has_ended() -> None:
    async def story(net: Net) -> None:
        old = await net.up()
        outcome, kept = Outcome(), Outcome()
        net.peer.numbered({"op": "w"}, b"x", outcome)
        old.lost()
        assert outcome.code == "unreachable"
        assert (net.peer.up, net.peer.reason) == (False, "the connection was lost")
        await net.until(lambda: net.peer.up)
        net.peer.numbered({"op": "w"}, b"y", kept)
        old.lost()
        assert net.peer.up, "another connection than the one of this session has ended"
        assert not kept.got

    with_net(story)


def test_a_connection_that_ends_before_it_was_greeted_on_is_tried_again() -> None:
    async def story(net: Net) -> None:
        net.hello = lambda: None
        await net.until(lambda: bool(net.wires) and bool(net.wire.of("hello")))
        net.hello = lambda: {"token": 5, "registered_seq": 7}
        net.wire.lost()
        assert await net.until(lambda: net.peer.up) < REPLICA_TIMEOUT_S / 2

    with_net(story)


def test_late_replies_of_a_session_that_ended_count_for_nothing() -> None:
    async def story(net: Net) -> None:
        old = await net.up()
        first, second = Outcome(), Outcome()
        net.peer.numbered({"op": "w"}, b"x", first)
        net.peer.fail("cut")
        await net.until(lambda: net.peer.state == UP)
        assert net.wire is not old
        assert old.closed
        net.peer.numbered({"op": "w"}, b"y", second)
        header = net.wire.of("w")[0]
        assert (header["t"], header["n"]) == (200, 0)
        old.reply(old.of("w")[0], {})
        old.reply(header, {})
        old.reply(header, error_reply(StaleSession("late")))
        assert first.code == "unreachable"
        assert not second.got
        assert net.peer.state == UP
        net.wire.reply(header, {})
        assert second.code == "done"

    with_net(story)


def test_a_reply_to_nothing_or_twice_is_ignored() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcome = Outcome()
        net.peer.numbered({"op": "w"}, b"x", outcome)
        header = wire.of("w")[0]
        wire.reply(header, {})
        wire.reply(header, {})
        numbers: list[object] = [None, "x", 10**6, [], True, -1]
        for number in numbers:
            wire.reply({"id": number}, {"err": "disk"})
        assert outcome.code == "done"
        assert net.peer.inflight_bytes == 0

    with_net(story)


@pytest.mark.parametrize("error", [Damaged("b"), StaleEpoch("e", epoch=9), NotReady("n")])
def test_an_error_of_one_request_leaves_the_session(error: UkaiError) -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcome = Outcome()
        net.peer.numbered({"op": "w"}, b"x", outcome)
        wire.reply(wire.of("w")[0], error_reply(error))
        assert outcome.code == error.code
        assert outcome.got[0][0].details == error.details  # type: ignore[union-attr]
        assert net.peer.state == UP

    with_net(story)


def test_a_refused_session_ends_and_another_begins() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        one, two = Outcome(), Outcome()
        net.peer.numbered({"op": "w"}, b"x", one)
        net.peer.numbered({"op": "w"}, b"x", two)
        wire.reply(wire.of("w")[0], error_reply(StaleSession("over")))
        assert (one.code, two.code) == ("stale-session", "unreachable")
        await net.until(lambda: net.peer.state == UP)
        assert len(net.wires) == 2
        assert net.wire.of("hello")[0]["try"] > wire.of("hello")[0]["try"]

    with_net(story)


def test_a_ping_finds_that_another_process_answers() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        net.ping = lambda: error_reply(StaleSession("another process"))
        await net.until(lambda: wire.closed)
        net.ping = lambda: {"stale": {}}
        await net.until(lambda: net.peer.state == UP)

    with_net(story)


def test_a_connection_that_takes_nothing_ends_the_session() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        before, outcome = Outcome(), Outcome()
        net.peer.numbered({"op": "w"}, b"x", before)
        wire.accepts = False
        assert not net.peer.numbered({"op": "w"}, b"x", outcome)
        assert (before.code, outcome.got) == ("unreachable", [])
        await net.until(lambda: net.peer.state == UP)
        await asyncio.sleep(5)
        wire = net.wire
        wire.accepts = False
        assert await net.until(lambda: wire.closed) <= BEAT_S + 0.1, "a ping that can't be sent tells as much"

    with_net(story)


def test_a_node_away_is_settled_as_away_and_tried_until_it_is_back() -> None:
    async def story(net: Net) -> None:
        net.reachable = False
        assert not await net.peer.settled()
        assert net.peer.reason == "no connection"
        assert net.peer.down_since == 50.0
        net.wall_s = 90.0
        await asyncio.sleep(60)
        assert net.peer.down_since == 50.0, "since when, not since the last attempt"
        with pytest.raises(Unreachable, match="can't be reached"):
            await net.peer.ask("r", {})
        net.reachable = True
        assert await net.until(lambda: net.peer.state == UP) < 2 * REPLICA_TIMEOUT_S
        net.peer.fail("cut")
        assert net.peer.down_since == 90.0

    with_net(story)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (lambda: None, "no answer within"),
        (lambda: error_reply(NotReady("not registered")), "not registered"),
        (lambda: error_reply(StaleSession("older")), "older"),
        (dict, "without a token"),
        (lambda: {"token": "x", "registered_seq": 1}, "without a token"),
        (lambda: {"token": 5, "registered_seq": None}, "without a token"),
        (lambda: {"token": True, "registered_seq": 1}, "without a token"),
        (lambda: {"err": [], "msg": {}}, "no reason"),
    ],
)
def test_a_hello_that_does_not_succeed_is_tried_again(hello: Callable[[], Header | None], reason: str) -> None:
    async def story(net: Net) -> None:
        good, net.hello = net.hello, hello
        assert not await net.peer.settled()
        assert reason in net.peer.reason
        await net.until(lambda: len(net.wires) > 3)
        assert all(w.closed for w in net.wires[:-1])
        tries = [w.of("hello")[0]["try"] for w in net.wires if w.of("hello")]
        assert tries == sorted(set(tries)), "a replica takes only a later hello"
        net.hello = good
        await net.until(lambda: net.peer.state == UP)

    with_net(story)


@pytest.mark.expect_log("defect while greeting")
@pytest.mark.parametrize("failure", [Behind("old metadata"), Unreachable("metad away"), ValueError("a defect")])
def test_metadata_that_can_not_be_had_keeps_the_peer_down(failure: Exception) -> None:
    async def story(net: Net) -> None:
        async def fails(seq: int) -> None:
            raise failure

        good, net.catch_up = net.catch_up, fails
        assert not await net.peer.settled()
        await asyncio.sleep(10)
        assert net.peer.state != UP
        net.catch_up = good
        await net.until(lambda: net.peer.state == UP)

    with_net(story)


def test_pings_confirm_that_no_higher_epoch_is_known_and_tell_of_one() -> None:
    async def story(net: Net) -> None:
        loop = asyncio.get_running_loop()
        wire = await net.up()
        begin = loop.time()
        await net.until(lambda: len(wire.of("ping")) >= 4)
        assert wire.of("ping")[0]["roles"] == {"u": 3}
        assert loop.time() - begin <= 3 * min(BEAT_S, REPLICA_TIMEOUT_S / 4) + 0.1
        await asyncio.sleep(0.1)
        assert loop.time() - net.peer.confirmed_at < BEAT_S + 0.2
        confirmed = net.peer.confirmed_at
        answers: list[Header] = [error_reply(NotReady("n")), {"stale": 5}, {}, {"stale": []}]
        for answer in answers:
            net.ping = lambda answer=answer: answer  # type: ignore[misc]
            count = len(wire.of("ping"))
            await net.until(lambda count=count: len(wire.of("ping")) >= count + 2)  # type: ignore[misc]
            assert net.peer.confirmed_at <= confirmed + 2 * BEAT_S
        net.ping = lambda: {"stale": {"u": 4, "v": "x", "w": None}}
        await net.until(lambda: bool(net.stale))
        assert set(net.stale) == {("u", 4)}
        net.peer.fail("cut")
        assert net.peer.confirmed_at == float("-inf")

    with_net(story)


def test_close_fails_all_and_leaves_nobody_waiting() -> None:
    async def story(net: Net) -> None:
        net.hello = lambda: None
        waiting = asyncio.create_task(net.peer.settled())
        await asyncio.sleep(0.1)
        net.peer.close()
        assert not await waiting
        assert not net.peer.numbered({"op": "w"}, b"x", Outcome())
        with pytest.raises(Unreachable):
            await net.peer.ask("r", {})

    with_net(story)


def test_an_asker_that_gave_up_does_not_disturb_the_others() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        asked = asyncio.create_task(net.peer.ask("r", {}))
        await net.until(lambda: bool(wire.of("r")))
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        wire.reply(wire.of("r")[0], error_reply(Damaged("x")))
        assert net.peer.state == UP

    with_net(story)


@pytest.mark.expect_log("defect while the session with node")
def test_all_hear_of_the_end_of_a_session_though_one_can_not_take_it() -> None:
    """A request that nobody answers any more would hold up its block for good, and so would a node without sessions."""

    async def story(net: Net) -> None:
        def broken(*_: object) -> None:
            raise KeyError("a defect")

        await net.up()
        outcome = Outcome()
        assert net.peer.numbered({"op": "w"}, b"x", broken)
        assert net.peer.numbered({"op": "w"}, b"x", outcome)
        await net.until(lambda: bool(outcome.got), REPLICA_TIMEOUT_S + 1)
        assert outcome.code == "unreachable"
        await net.until(lambda: net.peer.state == UP and len(net.wires) == 2)

    with_net(story)


# --- several writes in one message


def at_leisure(net: Net, block: int, uuid: str = "u", epoch: int = 3, size: int = 4) -> Outcome:
    outcome = Outcome()
    assert net.peer.write_at_leisure(uuid, epoch, block, 512, 7, bytes([block] * size), outcome)
    return outcome


def places(header: Header) -> list[int]:
    """The blocks that a message writes to."""
    return [block for block, _, _, _ in header["w"]]


def test_writes_at_leisure_are_one_message_before_anything_else() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [at_leisure(net, block) for block in range(3)]
        assert not wire.of("wt"), "nobody waits for them"
        assert net.peer.numbered({"op": "f"}, None, Outcome())
        (header,) = wire.of("wt")
        assert header["w"] == [[block, 512, 7, 4] for block in range(3)]
        assert wire.payloads[wire.sent.index(header)] == b"\0\0\0\0\1\1\1\1\2\2\2\2"
        assert (header["i"], header["e"], header["t"], header["n"], wire.of("f")[0]["n"]) == ("u", 3, 100, 0, 1)
        assert wire.sent.index(header) < wire.sent.index(wire.of("f")[0])
        assert net.peer.inflight_bytes == 12
        wire.reply(header, {})
        assert [o.code for o in outcomes] == ["done"] * 3
        at_leisure(net, 4)
        asked = asyncio.create_task(net.peer.ask("r", {}))  # what was written before is there
        await net.until(lambda: bool(wire.of("r")))
        assert [h["op"] for h in wire.sent if h["op"] in ("wt", "r")] == ["wt", "wt", "r"]
        asked.cancel()

    with_net(story)


def test_a_write_at_leisure_goes_by_itself_after_a_while() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        at_leisure(net, 1)
        assert await net.until(lambda: bool(wire.of("wt"))) <= 2 * LEISURE_S
        at_leisure(net, 2)
        assert len(wire.of("wt")) == 1, "the next one has a while of its own"
        await net.until(lambda: len(wire.of("wt")) == 2)
        assert [h["n"] for h in wire.of("wt")] == [0, 1]

    with_net(story)


@pytest.mark.parametrize(("count", "size"), [(LEISURE_WRITES, 1), (2, LEISURE_BYTES // 2)])
def test_so_much_does_not_wait(count: int, size: int) -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        for block in range(count - 1):
            at_leisure(net, block, size=size)
        assert not wire.of("wt")
        at_leisure(net, count - 1, size=size)
        assert places(wire.of("wt")[0]) == list(range(count))
        await asyncio.sleep(2 * LEISURE_S)
        assert len(wire.of("wt")) == 1

    with_net(story)


def test_another_image_or_epoch_is_another_message() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        for block, (uuid, epoch) in enumerate([("u", 3), ("u", 3), ("u", 4), ("v", 4), ("u", 4)]):
            at_leisure(net, block, uuid, epoch)
        await net.until(lambda: len(wire.of("wt")) == 4)
        assert [(h["i"], h["e"], h["n"], places(h)) for h in wire.of("wt")] == [
            ("u", 3, 0, [0, 1]),
            ("u", 4, 1, [2]),
            ("v", 4, 2, [3]),
            ("u", 4, 3, [4]),
        ]

    with_net(story)


def test_those_that_failed_are_told_and_no_others() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [at_leisure(net, block) for block in range(4)]
        await net.until(lambda: bool(wire.of("wt")))
        failed = [[1, error_reply(Damaged("b"))], [3, error_reply(NoSpace("full", touched=False))]]
        wire.reply(wire.of("wt")[0], {"failed": failed})
        assert [o.code for o in outcomes] == ["done", "damaged", "done", "no-space"]
        assert outcomes[3].got[0][0].details == {"touched": False}  # type: ignore[union-attr]
        assert net.peer.state == UP

    with_net(story)


ERROR = {"err": "disk", "msg": "m"}


@pytest.mark.parametrize(
    "told",
    [None, 5, "x", "", {}, {"0": ERROR}, [5], [[0]], [[0, 5]], [[0, {}]], [["x", ERROR]], [[2, ERROR]], [[-1, ERROR]],
     [[True, ERROR]], [[0, ERROR, 1]]],
)  # fmt: skip
def test_an_answer_that_can_not_be_read_is_no_success(told: object) -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [at_leisure(net, block) for block in range(2)]
        await net.until(lambda: bool(wire.of("wt")))
        wire.reply(wire.of("wt")[0], {"failed": told})
        assert [o.code for o in outcomes] == ["disk", "disk"]

    with_net(story)


def test_one_error_is_that_of_all() -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [at_leisure(net, block) for block in range(2)]
        await net.until(lambda: bool(wire.of("wt")))
        wire.reply(wire.of("wt")[0], error_reply(StaleEpoch("e", epoch=9)))
        assert [o.code for o in outcomes] == ["stale-epoch", "stale-epoch"]

    with_net(story)


@pytest.mark.parametrize("sent", [False, True])
def test_the_end_of_a_session_fails_what_waits_at_leisure_once(sent: bool) -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [at_leisure(net, block) for block in range(2)]
        if sent:
            await net.until(lambda: bool(wire.of("wt")))
        net.peer.fail("cut")
        assert [o.code for o in outcomes] == ["unreachable"] * 2
        assert not net.peer.write_at_leisure("u", 3, 0, 0, 7, b"x", Outcome())
        await net.until(lambda: net.peer.state == UP)
        await asyncio.sleep(2 * LEISURE_S)
        assert not net.wire.of("wt"), "what has failed is not sent in the next session"

    with_net(story)


@pytest.mark.parametrize("after", ["a while", "another image", "a flush", "so many"])
def test_a_connection_lost_at_leisure_fails_all_once(after: str) -> None:
    async def story(net: Net) -> None:
        wire = await net.up()
        outcomes = [at_leisure(net, block) for block in range(LEISURE_WRITES - 1)]
        wire.accepts = net.reachable = False
        last = Outcome()
        if after == "a while":
            await net.until(lambda: net.peer.state != UP)
        elif after == "another image":
            assert not net.peer.write_at_leisure("v", 3, 0, 0, 7, b"x", last)
        elif after == "a flush":
            assert not net.peer.numbered({"op": "f"}, None, last)
        else:
            outcomes.append(at_leisure(net, 0))
        assert [o.code for o in outcomes] == ["unreachable"] * len(outcomes)
        assert not last.got
        assert net.peer.inflight_bytes == 0

    with_net(story)
