"""Stores in a temporary directory, as the tests here make them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ukai.blockd.disk import Disk
from ukai.blockd.image_store import ImageStore
from ukai.blockd.store import Store

STORE_ID = "5d2fb2c4-53c5-4a6c-8f9a-3d7a70b8a001"
UUID = "11111111-2222-4333-8444-555555555555"
OTHER_UUID = "99999999-2222-4333-8444-555555555555"
FORMAT = "%016d"


def open_store(root: Path, disk: Disk | None = None, limit: int = 64) -> Store:
    store = Store(str(root), FORMAT, disk or Disk(), limit)
    store.open(STORE_ID)
    return store


def new_image(
    store: Store, size: int = 40960, block_size: int = 8192, *, mode: str = "create", name: str = "image01"
) -> ImageStore:
    return store.prepare(UUID, name, size, block_size, mode)


def block_path(store: Store, block: int, name: str = "image01") -> Path:
    return Path(store.root) / name / (FORMAT % block)


def write(image: ImageStore, block: int, offset: int, data: bytes, generation: int) -> None:
    """A write as a coordinator has it done: the block is stamped first."""
    image.ready(block, generation, image.generations[block])
    image.write(block, offset, data, generation)


def drop(store: Store) -> None:
    """Delete the image, as blockd does with a thread."""
    store.drop(UUID, "image01")()
    store.forget(UUID)


def flush(image: ImageStore, blocks: list[int]) -> dict[int, str]:
    """What ``Replica.flush`` does, without a thread: block → reason for those that failed."""
    image.take_unflushed()
    return flush_these(image, blocks)


def flush_these(image: ImageStore, blocks: Iterable[int]) -> dict[int, str]:
    """The same, and other blocks stay unflushed."""
    work = image.flush_begin(blocks)
    numbers = image.flush_beside(work)
    image.flush_look(work)
    return image.flush_end(work, numbers)


def pattern(length: int, seed: int) -> bytes:
    """Bytes that differ from place to place and from seed to seed, none of them zero."""
    return bytes((seed * 31 + i * 7 + (i >> 8)) % 255 + 1 for i in range(length))


def descriptors() -> list[str]:
    """What this process has open under /proc/self/fd, regular files and directories."""
    out = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except OSError:
            continue
        if target.startswith("/") and not target.startswith(("/proc", "/dev")):
            out.append(target)
    return sorted(out)
