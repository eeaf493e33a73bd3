"""What the frontend's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.harness import Stand


@pytest.fixture
def stand(tmp_path: Path, binding: str) -> Iterator[Stand]:
    """A frontend that has an image mounted, with each binding."""
    with Stand(tmp_path, binding) as one:
        yield one
