"""What the copies of a block hold, read from the block files themselves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IN_SYNC = 0
CHUNK_BYTES = 1 << 20
_ZEROS = bytes(CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Difference:
    """A block whose in-sync copies are not the same."""

    image: str
    block_index: int
    digests: Mapping[str, str]

    def __str__(self) -> str:
        copies = ", ".join(f"{node} {digest[:12]}" for node, digest in self.digests.items())
        return f"{self.image} block {self.block_index}: {copies}"


def block_digest(path: Path, length_bytes: int) -> str:
    """SHA-256 of a block's content.

    A missing file, a hole and what lies past the end read as zeros.  Zeros go in as their position alone, which
    tells the same contents from different ones and makes a sparse file as cheap as its data.
    """
    digest = hashlib.sha256(f"{length_bytes}\n".encode())
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return digest.hexdigest()
    try:
        end = min(length_bytes, os.fstat(fd).st_size)
        offset = 0
        while offset < end:
            try:
                offset = os.lseek(fd, offset, os.SEEK_DATA) // CHUNK_BYTES * CHUNK_BYTES
            except OSError:  # ENXIO: only holes follow
                break
            chunk = os.pread(fd, min(CHUNK_BYTES, end - offset), offset)
            if not chunk:
                break
            if chunk != _ZEROS[: len(chunk)]:
                digest.update(f"{offset}\n".encode())
                digest.update(chunk.ljust(min(CHUNK_BYTES, length_bytes - offset), b"\0"))
            offset += CHUNK_BYTES
    finally:
        os.close(fd)
    return digest.hexdigest()


def differences(
    image: Mapping[str, Any], data_roots: Mapping[str, Path], block_name: Callable[[int], str]
) -> tuple[int, list[Difference]]:
    """Compare the in-sync copies of ``image``, as ``image.show`` gives it.  Returns (copies read, what differs)."""
    name, size_bytes, block_size = image["name"], image["size"], image["block_size"]
    unsettled: set[int] = set()
    if image["writer"] is None:
        unsettled = {i for first, last in image["active"] for i in range(first, last + 1)}
    copies, found = 0, []
    for entry in image["placement"]:
        nodes = [node for node, replica in entry["replicas"].items() if replica["status"] == IN_SYNC]
        for index in range(entry["first"], entry["last"] + 1):
            length = min(block_size, size_bytes - index * block_size)
            digests = {node: block_digest(data_roots[node] / name / block_name(index), length) for node in nodes}
            copies += len(digests)
            if index not in unsettled and len(set(digests.values())) > 1:
                found.append(Difference(name, index, digests))
    return copies, found
