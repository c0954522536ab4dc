"""What a query's answers mean for a hit."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from pegaflow.connector.groups import CacheGroup
from pegaflow.connector.lookup import Asked, ends_of

TOKENS = 16


def answered(present: list[bool], computed: int) -> Asked:
    """A question about so many blocks, and which of them group 1 has."""
    bits = sum(1 << at for at, there in enumerate(present) if there)
    bitmap: Any = SimpleNamespace(to_int=lambda: bits)
    completion: Any = SimpleNamespace(bitmap=bitmap, lease=1)
    limit = computed + len(present) * TOKENS
    return Asked(computed, limit, {}, 0.0, answers={1: completion})


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8, 40])
def test_a_group_serves_a_hit_that_ends_where_all_it_needs_is_there(window: int | None) -> None:
    generator = random.Random(window)
    group = CacheGroup(1, 1, TOKENS, 1, window)
    for _ in range(200):
        chance = generator.choice([0.0, 0.5, 0.9, 1.0])
        present = [generator.random() < chance for _ in range(generator.randrange(1, 30))]
        ends = ends_of(group, answered(present, generator.randrange(4) * TOKENS))
        for end in range(len(present) + 1):
            begin = 0 if window is None else max(0, end - window)
            assert (ends[end] == "1") == all(present[begin:end]), (present, end, ends)


def test_an_answer_without_a_bitmap_serves_nothing_new() -> None:
    asked = answered([True] * 4, 0)
    asked.answers[1] = SimpleNamespace(bitmap=None, lease=0)  # type: ignore[assignment]
    for window in (None, 3):
        assert ends_of(CacheGroup(1, 1, TOKENS, 1, window), asked)[:5] == "10000"
