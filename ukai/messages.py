"""Messages: a msgpack map as header, and for some a payload of raw bytes in a frame of its own.

Pure: no socket in here.  ``PROTOCOL.md`` beside this file is the specification; a change there and here goes
with a new ``VERSION``.  An unknown field is ignored, an unknown version is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import msgpack

from ukai.errors import RemoteProtocolError, UkaiError, VersionError, from_wire, one_line
from ukai.ranges import RangeMap

VERSION = 1

HEADER_LIMIT_BYTES = 4 * 2**20
COLLECTION_LIMIT = 200_000
REPLY_LIMIT_BYTES = 512 * 2**20
"""Largest reply taken from a process that we connected to: a snapshot of the metadata may be large."""

Header: TypeAlias = dict[str, Any]
Ranges: TypeAlias = list[tuple[int, int]]

_packb = msgpack.Packer(autoreset=True).pack


def pack(header: Header) -> bytes:
    """Encode a header; ``v`` is added."""
    header["v"] = VERSION
    data: bytes = _packb(header)
    return data


def unpack(frame: bytes | memoryview, limit: int = HEADER_LIMIT_BYTES) -> Header:
    """Decode one header frame of at most ``limit`` bytes.

    Raises RemoteProtocolError for anything that is not a map with text keys within the limits, VersionError
    for a version that is not ours.
    """
    if len(frame) > limit:
        raise RemoteProtocolError(f"header of {len(frame)} bytes is over the limit of {limit}")
    elements = min(len(frame), max(COLLECTION_LIMIT, limit // 8))
    try:
        header = msgpack.unpackb(frame, max_array_len=elements, max_map_len=elements, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, OverflowError, MemoryError) as e:
        raise RemoteProtocolError(f"header is not valid msgpack: {type(e).__name__}") from None
    if type(header) is not dict or not set(map(type, header)) <= {str}:
        raise RemoteProtocolError("header is not a map with text keys")
    version = header.get("v")
    if type(version) is not int or version != VERSION:
        raise VersionError(f"protocol version {show(version)} is not {VERSION}; run the same release on all nodes")
    return header


def show(value: object) -> str:
    """A peer's value in few characters; what is in a list or map is not looked at, since it may be deep."""
    if isinstance(value, list | tuple | dict):
        return f"a {'map' if isinstance(value, dict) else 'list'} of {len(value)}"
    return repr(value[:50] if isinstance(value, str | bytes) else value)[:60]


def error_reply(error: BaseException) -> Header:
    """The fields of a reply that reports ``error``."""
    if isinstance(error, UkaiError):
        reply: Header = {"err": error.code, "msg": error.message}
        if error.details:
            reply["details"] = error.details
        return reply
    return {"err": "failed", "msg": one_line(f"internal error: {type(error).__name__}: {error}")}


def reported(fields: Header) -> UkaiError:
    """The error in ``fields`` that have ``err``: what error_reply() made them of."""
    error = from_wire(fields["err"], fields.get("msg", ""))
    details = fields.get("details")
    error.details = {str(k): v for k, v in details.items()} if isinstance(details, dict) else {}
    return error


def raise_error(reply: Header) -> None:
    """Raise the error that a reply carries, if it carries one."""
    if reply.get("err") is not None:
        raise reported(reply)


def integer(header: Header, name: str, low: int = 0, high: int = 2**63 - 1, default: int | None = None) -> int:
    """The whole number ``name`` of a peer's message.  Raises RemoteProtocolError."""
    value = header.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise RemoteProtocolError(f"field {name}: a whole number from {low} to {high} is wanted, not {show(value)}")
    return value


def text(header: Header, name: str, limit: int = 4096, default: str | None = None) -> str:
    """The text ``name`` of a peer's message.  Raises RemoteProtocolError."""
    value = header.get(name, default)
    if type(value) is not str or len(value) > limit:
        raise RemoteProtocolError(f"field {name}: a text of at most {limit} characters is wanted, not {show(value)}")
    return value


def flag(header: Header, name: str) -> bool:
    """The truth value ``name``, false when absent.  Raises RemoteProtocolError."""
    value = header.get(name, False)
    if type(value) is not bool:
        raise RemoteProtocolError(f"field {name}: true or false is wanted, not {show(value)}")
    return value


def texts(header: Header, name: str, limit: int = 10_000) -> list[str]:
    """The list of texts ``name``, empty when absent.  Raises RemoteProtocolError."""
    value = header.get(name, [])
    if type(value) is not list or len(value) > limit or any(type(v) is not str for v in value):
        raise RemoteProtocolError(f"field {name}: a list of texts is wanted, not {show(value)}")
    return value


def ranges(header: Header, name: str, high: int = 2**63 - 1) -> Ranges:
    """The list of ``[first, last]`` block ranges ``name`` (both ends included), empty when absent."""
    out: Ranges = []
    for item in _rows(header, name, "[first, last]", 2):
        if not 0 <= item[0] <= item[1] <= high:
            raise RemoteProtocolError(f"field {name}: range {item} is out of order or out of bounds")
        out.append((item[0], item[1]))
    return out


def places(header: Header, name: str, high: int) -> Iterator[list[int]]:
    """The list of ``[block, offset, generation, length]`` ``name``, none of them empty, blocks up to ``high``.

    Raises RemoteProtocolError.
    """
    for item in _rows(header, name, "[block, offset, generation, length]", 4):
        block, offset, generation, length = item
        if type(generation) is not int or type(length) is not int:
            raise RemoteProtocolError(f"field {name}: whole numbers are wanted, not {show(item)}")
        if not 0 <= block <= high or offset < 0 or generation < 1 or length < 1:
            raise RemoteProtocolError(f"field {name}: {item} is out of bounds")
        yield item


def range_map(header: Header, name: str, kind: type, high: int = 2**63 - 1) -> RangeMap[Any]:
    """The list of ``[first, last, value]`` ``name`` (both ends included), values of ``kind``; empty when absent.

    Raises RemoteProtocolError.
    """
    out: RangeMap[Any] = RangeMap()
    for item in _rows(header, name, "[first, last, value]", 3):
        if not 0 <= item[0] <= item[1] <= high or type(item[2]) is not kind:
            raise RemoteProtocolError(f"field {name}: {show(item)} is out of order, out of bounds or of the wrong kind")
        out.set(item[0], item[1], item[2])
    return out


def _rows(header: Header, name: str, form: str, length: int) -> Iterator[list[Any]]:
    """The lists of ``length`` values, of which the first two are whole numbers, in ``name``; none when absent."""
    value = header.get(name, [])
    if type(value) is not list:
        raise RemoteProtocolError(f"field {name}: a list of {form} is wanted")
    for item in value:
        if type(item) is not list or len(item) != length or type(item[0]) is not int or type(item[1]) is not int:
            raise RemoteProtocolError(f"field {name}: {form} is wanted, not {show(item)}")
        yield item
