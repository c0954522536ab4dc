"""What a query's answers mean for a hit."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from pegaflow.connector.groups import CacheGroup
from pegaflow.connector.lookup import Asked, Lookup, ends_of

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


@pytest.mark.parametrize("chunk", [16, 32, 40, 48, 8, 1000])
def test_a_group_of_chunks_serves_a_hit_if_the_beginning_of_its_last_chunk_is_there(
    chunk: int,
) -> None:
    generator = random.Random(chunk)
    group = CacheGroup(1, 1, TOKENS, 1, chunk_tokens=chunk, sliding=True)
    for _ in range(200):
        chance = generator.choice([0.0, 0.5, 0.9, 1.0])
        present = [generator.random() < chance for _ in range(generator.randrange(1, 30))]
        base = generator.randrange(4)
        ends = ends_of(group, answered(present, base * TOKENS))
        assert len(ends) == len(present) + 1
        for end in range(1, len(present) + 1):
            # The first block with a token that the next one sees.
            begin = (base + end) * TOKENS // chunk * chunk // TOKENS
            assert (ends[end] == "1") == all(present[max(0, begin - base) : end])


def test_an_answer_without_a_bitmap_serves_nothing_new() -> None:
    asked = answered([True] * 4, 0)
    asked.answers[1] = SimpleNamespace(bitmap=None, lease=0)  # type: ignore[assignment]
    for window in (None, 3):
        assert ends_of(CacheGroup(1, 1, TOKENS, 1, window), asked)[:5] == "10000"


@pytest.mark.parametrize("drops", [False, True])
def test_a_hit_of_groups_with_blocks_of_different_sizes_is_the_longest_that_all_can_serve(
    drops: bool,
) -> None:
    generator = random.Random(7)
    full = CacheGroup(0, 0, 2 * TOKENS, 2)
    for _ in range(300):
        window = CacheGroup(1, 1, TOKENS, 1, generator.choice([1, 3, 4]), sliding=True)
        blocks, computed = generator.randrange(1, 12), generator.randrange(3) * 2 * TOKENS
        present = [generator.random() < 0.8 for _ in range(2 * blocks)]
        asked = answered(present, computed)
        prefix = generator.randrange(blocks + 1)
        asked.answers[0] = SimpleNamespace(count=prefix, lease=2)  # type: ignore[assignment]
        lookup = Lookup.__new__(Lookup)
        lookup._groups, lookup.align = [full, window], 2 * TOKENS
        lookup.beyond = drops * lookup.align
        wide = window.window_blocks or 0
        most = max(prefix - drops, 0)
        best = max(at for at in range(most + 1) if all(present[max(0, 2 * at - wide) : 2 * at]))
        held, end = lookup._combined(asked)
        assert end == computed + best * 2 * TOKENS
        assert [one.group for one in held] == ([full, window] if best else [])
        if best:
            base = computed // TOKENS
            begin = max(0, 2 * best - wide)
            assert (held[1].begin, held[1].end) == (base + begin, base + 2 * best)
            assert held[1].first == sum(present[:begin])
