"""The JSON form of an image: what ``create_metadata`` writes and ``get_diskinfo --json`` prints.

Written piece by piece, a line per block: an image may have millions of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from ukai.ctl.schema import Map
from ukai.errors import Refused, RemoteProtocolError


def text(header: Map, parts: Iterable[tuple[int, dict[str, int]]]) -> Iterator[str]:
    """The file in pieces.

    ``header`` holds name, size, block_size and hypervisors; ``parts`` are runs of blocks: how many, and the
    sync_status on each location.
    """
    yield json.dumps(header, ensure_ascii=False, indent=4).rstrip("}\n") + ',\n    "blocks": ['
    separator = "\n        "
    for count, replicas in parts:
        block = json.dumps({node: {"sync_status": status} for node, status in replicas.items()})
        for _ in range(count):
            yield separator + block
            separator = ",\n        "
    yield "\n    ]\n}\n"


def of_new(
    name: str, size_bytes: int, block_size_bytes: int, hypervisors: list[str], locations: list[str]
) -> Iterator[str]:
    """A new image's file: each block on each location, in sync."""
    header = {"name": name, "size": size_bytes, "block_size": block_size_bytes, "hypervisors": hypervisors}
    return text(header, [(-(-size_bytes // block_size_bytes), dict.fromkeys(locations, 0))])


def of_image(image: Map) -> Iterator[str]:
    """A known image's file, from its placement.

    Raises Refused when metad left out a part of that, RemoteProtocolError when it has holes.
    """
    if image["placement_omitted"]:
        raise Refused(
            f"image {image['name']} is in too many pieces to print each block: metad left out "
            f"{image['placement_omitted']} ranges; bring it in sync first: ukai-ctl sync start {image['name']}"
        )
    header = {key: image[key] for key in ("name", "size", "block_size", "hypervisors")}
    parts = []
    expected = 0
    for part in image["placement"]:
        if part["first"] != expected or part["last"] < part["first"]:
            raise RemoteProtocolError(f"image {image['name']}: metad's placement has no block {expected}")
        expected = part["last"] + 1
        replicas = {node: replica["status"] for node, replica in part["replicas"].items()}
        parts.append((expected - part["first"], replicas))
    if expected != image["blocks"]:
        raise RemoteProtocolError(f"image {image['name']}: metad's placement ends before block {expected}")
    return text(header, parts)
