"""The oracles bite: whoever breaks a rule is caught within a few seeds, which the code as it is passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

import pytest

from tests.sim.ahead import Jobs, Records, records
from tests.sim.mutations import MUTATIONS, RULES, Mutation
from tests.sim.run import results, worker
from tests.sim.scenario import RARE

SEEDS = 40
"""Within so many a broken rule must be found out."""


def _run(mutation: Mutation, count: int, name: str) -> Records:
    """Until there is a violation."""
    force = json.dumps(mutation.forced, sort_keys=True)
    return results(worker(1, count, 1, mutation.seconds, force=force, mutation=name, hasty=True))


JOBS: Jobs = {m.name: partial(_run, m, SEEDS, m.name) for m in MUTATIONS}
"""The last run of each has a violation if the mutation was caught."""


def test_each_rule_is_broken() -> None:
    assert {m.rule for m in MUTATIONS} == set(RULES)
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.rule} {m.name}")
def test_a_broken_rule_is_caught(mutation: Mutation) -> None:
    told = records(mutation.name)
    violations = told[-1]["violations"]
    assert violations, f"nothing found in {len(told)} seeds"
    assert any(words in violations[0] for words in mutation.expect), violations[0]


def unbroken(told: Mapping[str, Records]) -> Jobs:
    """The code as it is, with each set of faults: as many seeds as it took to catch all that was broken with it."""
    wanted: dict[tuple[str, float], tuple[Mutation, int]] = {}
    for mutation in MUTATIONS:
        key = (json.dumps(mutation.forced, sort_keys=True), mutation.seconds)
        _, before = wanted.get(key, (mutation, 0))
        wanted[key] = (mutation, max(before, len(told[mutation.name])))
    return {f"{m.name}: not so": partial(_run, m, count, "") for m, count in wanted.values()}


@pytest.mark.slow
def test_the_code_as_it_is_passes_the_same_seeds() -> None:
    caught = {m.name: records(m.name) for m in MUTATIONS}
    happened: set[str] = set()
    for job in unbroken(caught):
        told = records(job)
        assert [r["violations"] for r in told] == [[]] * len(told), job
        assert len(told) >= len(caught[job.removesuffix(": not so")])
        assert any(r["counts"].get("acknowledged") for r in told)
        happened |= {kind for r in told for kind, times in r["faults"].items() if times}
    assert happened >= set(RARE), "a kind of fault that never happened proves nothing"
