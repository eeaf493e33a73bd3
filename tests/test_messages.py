"""The wire: whatever bytes arrive, the outcome is a header or a RemoteProtocolError."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ukai import messages
from ukai.errors import BY_CODE, RemoteProtocolError, UkaiError, VersionError
from ukai.messages import VERSION, error_reply, flag, integer, pack, raise_error, ranges, text, texts, unpack

DEEP = 900

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
headers = st.dictionaries(st.text(max_size=8), values, max_size=6)


def _deep(levels: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(levels):
        out = [out]
    return out


def _attempt(read: Callable[..., Any], *args: object) -> Any:
    """What it gives, or the RemoteProtocolError it ends with, which is one short line."""
    try:
        return read(*args)
    except RemoteProtocolError as e:
        error = e
    assert "\n" not in error.message
    assert len(error.message) < 300
    return error


def _take(frame: bytes) -> dict[str, Any] | None:
    got = _attempt(unpack, frame)
    return None if isinstance(got, RemoteProtocolError) else got


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc9\x00\x00\x00\x00\x01")
@example(b"\x81\xa1v\xc7\x00\xff")
@example(b"\x81\xc7\x00\xff\x01")
@example(b"\x81\xc4\x01v\x01")
@example(b"\x91" * 100_000)
@example(b"\x81\x91\x01\x01")
@example(b"\x82\xa1v\x01\xa1v\x01\xff")
@example(b"\x81\xa1v\xa2\xff\xff")
def test_random_bytes_are_a_header_or_refused(frame: bytes) -> None:
    header = _take(frame)
    assert header is None or (header["v"] == VERSION and all(type(k) is str for k in header))


@settings(max_examples=300, deadline=None)
@given(headers, st.integers(0, 300), st.binary(max_size=6), st.integers(0, 300))
def test_a_valid_message_cut_or_altered_is_a_header_or_refused(
    header: dict[str, Any], at: int, piece: bytes, cut: int
) -> None:
    packed = bytearray(pack(header))
    packed[at % len(packed) : at % len(packed) + len(piece)] = piece
    _take(bytes(packed))
    _take(bytes(packed[: cut % (len(packed) + 1)]))


@given(headers)
def test_what_is_packed_is_unpacked(header: dict[str, Any]) -> None:
    assert unpack(pack(dict(header))) == {**header, "v": VERSION}


@pytest.mark.parametrize(
    "value", [[], "text", 7, None, True, {1: 2}, {b"v": 1}, {b"x": 1, "v": 1}, {None: 1}, {"v": 1, 5: 1}]
)
def test_what_is_no_map_with_text_keys_is_refused(value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack(msgpack.packb(value))


@pytest.mark.parametrize("version", [0, 2, -1, True, 1.0, "1", None, [1], "x" * 10_000, _deep(DEEP)])
def test_another_version_is_refused_with_a_clear_line(version: object) -> None:
    with pytest.raises(VersionError, match="same release on all nodes") as caught:
        unpack(msgpack.packb({"v": version}))
    assert len(caught.value.message) < 200
    with pytest.raises(VersionError):
        unpack(msgpack.packb({}))


def test_a_header_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        unpack(b"\x00" * (messages.HEADER_LIMIT_BYTES + 1))
    with pytest.raises(RemoteProtocolError, match="over the limit of 10"):
        unpack(b"\x00" * 11, 10)
    assert unpack(pack({"x": b"y" * 100}), 200)["x"] == b"y" * 100


def test_a_few_bytes_that_claim_to_be_much_cost_nothing() -> None:
    array, table = b"\xdd\x00\x07\xff\xff", b"\xdf\x00\x03\xff\xff"
    begin = time.process_time()
    for bomb in (array * 1000, table * 1000, b"\x82\xa1v\x01\xa1x" + array * 1000, b"\xc6\xff\xff\xff\xff" + b"x" * 50):
        with pytest.raises(RemoteProtocolError):
            unpack(bomb)
        with pytest.raises(RemoteProtocolError):
            unpack(bomb, messages.REPLY_LIMIT_BYTES)
    assert time.process_time() - begin < 1


def test_a_reply_may_hold_more_elements_than_a_request() -> None:
    many = msgpack.packb({"v": VERSION, "changes": [[1, 2]] * 600_000})
    assert len(unpack(many, messages.REPLY_LIMIT_BYTES)["changes"]) == 600_000
    with pytest.raises(RemoteProtocolError):
        unpack(many[: messages.HEADER_LIMIT_BYTES])


# --- fields

READERS: list[Callable[[dict[str, Any], str], object]] = [
    integer,
    text,
    flag,
    texts,
    ranges,
    lambda header, name: integer(header, name, 5, 10, 7),
    lambda header, name: text(header, name, 3, "abc"),
    lambda header, name: ranges(header, name, 9),
]


@settings(max_examples=300, deadline=None)
@given(values)
@example("x" * 5000)
@example([[0, True]])
@example([[5, 4]])
@example([[-1, 4]])
@example(2**63)
def test_a_field_is_what_is_wanted_or_refused(value: object) -> None:
    _read_all(value)


def _read_all(value: object) -> None:
    for read in READERS:
        for header in ({"x": value}, {}):
            got = _attempt(read, header, "x")
            assert got is not None
            if isinstance(got, RemoteProtocolError):
                assert "field x" in got.message


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: [v, 1], lambda v: {"a": v}], ids="0123")
def test_a_deep_field_is_refused_like_any_other(wrap: Callable[[Any], Any]) -> None:
    _read_all(wrap(unpack(pack({"x": _deep(DEEP)}))["x"]))


def test_fields_keep_their_bounds() -> None:
    assert integer({"n": 5}, "n", 5, 5) == 5
    assert integer({}, "n", default=3) == 3
    assert text({}, "s", default="d") == "d"
    assert flag({}, "f") is False
    assert texts({}, "l") == []
    assert ranges({"r": [[0, 4], [7, 7]]}, "r", 7) == [(0, 4), (7, 7)]
    for header, read in (
        ({"n": 4}, lambda h: integer(h, "n", 5, 9)),
        ({"n": 10}, lambda h: integer(h, "n", 5, 9)),
        ({"n": True}, lambda h: integer(h, "n")),
        ({"n": 1.0}, lambda h: integer(h, "n")),
        ({"s": "abcd"}, lambda h: text(h, "s", 3)),
        ({"l": ["a", 1]}, lambda h: texts(h, "l")),
        ({"l": ["a"] * 3}, lambda h: texts(h, "l", 2)),
        ({"r": [[0, 8]]}, lambda h: ranges(h, "r", 7)),
        ({"r": [[0, 1, 2]]}, lambda h: ranges(h, "r")),
    ):
        with pytest.raises(RemoteProtocolError):
            read(header)


# --- errors on the wire


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_an_error_travels_with_its_details(code: str) -> None:
    error = BY_CODE[code]("one line", touched=True, ranges=[[0, 3]])
    with pytest.raises(UkaiError) as caught:
        raise_error(unpack(pack(error_reply(error))))
    assert type(caught.value) is BY_CODE[code]
    assert caught.value.details == {"touched": True, "ranges": [[0, 3]]}


def test_a_reply_without_an_error_raises_nothing() -> None:
    raise_error({})
    raise_error({"err": None})


@given(values, values, values)
def test_any_error_reply_raises_an_error_of_ours(err: object, msg: object, details: object) -> None:
    reply = {"err": err, "msg": msg, "details": details}
    if err is None:
        raise_error(reply)
        return
    with pytest.raises(UkaiError):
        raise_error(reply)


def test_a_defect_is_told_in_one_line() -> None:
    reply = error_reply(ValueError("a\nb"))
    assert reply == {"err": "failed", "msg": "internal error: ValueError: a b"}
