"""Which cases of a large table ``make test`` runs: a sample that a seed draws; ``make soak-cases`` runs all."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

ALL = os.environ.get("UKAI_TEST_CASES") == "all"
SEED = int(os.environ.get("UKAI_TEST_SEED", "1"))
EXAMPLES = int(os.environ.get("UKAI_TEST_EXAMPLES", "60" if ALL else "3"))
"""How many orders of events the state machine plays."""


def sample(cases: Sequence[T], count: int) -> list[T]:
    """``count`` of them in their order, or all."""
    if ALL or count >= len(cases):
        return list(cases)
    chosen = sorted(random.Random(SEED).sample(range(len(cases)), count))
    return [cases[n] for n in chosen]
