"""Stores that are closed after the test, and leave no descriptor open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.blockd.files import descriptors, new_image, open_store
from ukai.blockd.disk import Disk
from ukai.blockd.image_store import ImageStore
from ukai.blockd.store import Store

OpenStore = Callable[..., Store]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def reopen(root: Path) -> Iterator[OpenStore]:
    """Open the store under ``root``; what was open before is closed first."""
    before = descriptors()
    made: list[Store] = []

    def open_again(disk: Disk | None = None, limit: int = 64) -> Store:
        for store in made:
            store.close()
        made.append(open_store(root, disk, limit))
        return made[-1]

    yield open_again
    for store in made:
        store.close()
    assert descriptors() == before


@pytest.fixture
def store(reopen: OpenStore) -> Store:
    return reopen()


@pytest.fixture
def image(store: Store) -> ImageStore:
    """Five blocks of 8192 bytes."""
    return new_image(store)
