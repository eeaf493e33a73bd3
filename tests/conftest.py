"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.processes.sample import ALL

pytest_plugins = [
    "tests.sim.ahead",  # first: what others import is not rewritten any more
    *(f"tests.plugins.{name}" for name in ("ending", "leaks", "logs", "fuse_required")),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a campaign are not looked at in ``make test``: skipped they would be failures (see fuse_required)."""
    if not ALL:
        left_out = [item for item in items if item.get_closest_marker("campaign") is not None]
        items[:] = [item for item in items if item not in left_out]
        if left_out:
            config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.fuse) for name in ("mfusepy", "fusepy")])
def binding(request: pytest.FixtureRequest) -> str:
    """Each FUSE binding in turn."""
    name: str = request.param
    return name


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Clusters that run, from the arguments of ``Cluster`` after the first.

    After the test everything is healed, all in-sync copies of every block are compared, and nothing may be left.
    """
    made: list[Cluster] = []

    def make(*args: object, **kwargs: object) -> Cluster:
        one = Cluster(tmp_path / f"cluster{len(made)}", *args, **kwargs)  # type: ignore[arg-type]
        made.append(one)
        one.start_all()
        return one

    faults: list[str] = []
    try:
        yield make
        for one in made:
            one.heal()
            one.compare_replicas()
    finally:
        for one in made:
            faults += one.close()
    assert not faults, "; ".join(faults)
