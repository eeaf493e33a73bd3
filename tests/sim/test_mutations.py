"""The oracles bite: whoever breaks a rule is caught within a few seeds, which the code as it is passes."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from tests.sim.mutations import MUTATIONS, RULES, Mutation
from tests.sim.run import results, worker
from tests.sim.scenario import RARE

SEEDS = 40
"""Within so many a broken rule must be found out."""
TOGETHER = 2


def _start(mutation: Mutation, count: int, name: str) -> subprocess.Popen[str]:
    force = json.dumps(mutation.forced, sort_keys=True)
    return worker(1, count, 1, mutation.seconds, force=force, mutation=name, hasty=True)


@cache
def _caught() -> dict[str, list[dict[str, Any]]]:
    """Name of each mutation → its runs, the last of which has a violation if it was caught."""
    with ThreadPoolExecutor(TOGETHER) as hands:
        found = hands.map(lambda m: results(_start(m, SEEDS, m.name)), MUTATIONS)
        return {m.name: records for m, records in zip(MUTATIONS, found, strict=True)}


def test_each_rule_is_broken() -> None:
    assert {m.rule for m in MUTATIONS} == set(RULES)
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.rule} {m.name}")
def test_a_broken_rule_is_caught(mutation: Mutation) -> None:
    records = _caught()[mutation.name]
    violations = records[-1]["violations"]
    assert violations, f"nothing found in {len(records)} seeds"
    assert any(words in violations[0] for words in mutation.expect), violations[0]


@pytest.mark.slow
def test_the_code_as_it_is_passes_the_same_seeds() -> None:
    wanted: dict[tuple[str, float], tuple[Mutation, int]] = {}
    for mutation in MUTATIONS:
        key = (json.dumps(mutation.forced, sort_keys=True), mutation.seconds)
        _, before = wanted.get(key, (mutation, 0))
        wanted[key] = (mutation, max(before, len(_caught()[mutation.name])))
    with ThreadPoolExecutor(TOGETHER) as hands:
        happened: set[str] = set()
        found = hands.map(lambda item: results(_start(item[0], item[1], "")), wanted.values())
        for (mutation, count), records in zip(wanted.values(), found, strict=True):
            assert [r["violations"] for r in records] == [[]] * count, (mutation.name, mutation.forced)
            assert any(r["counts"].get("acknowledged") for r in records)
            happened |= {kind for r in records for kind, times in r["faults"].items() if times}
    assert happened >= set(RARE), "a kind of fault that never happened proves nothing"
