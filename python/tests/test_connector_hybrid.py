"""Engines with several groups of caches, over a real daemon: windows, chunks, recurrent state."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pegaflow.connector.groups import CacheGroup, window_blocks
from pegaflow.connector.meta import StepMeta
from pegaflow.connector.scheduler import Step

from .engine_support import BLOCK_TOKENS, FULL, Engine, Make, Request, tokens
from .support import Daemon, eventually

WINDOW = CacheGroup(1, 1, BLOCK_TOKENS, 1, window_blocks(32, BLOCK_TOKENS), sliding=True)
CHUNKS = CacheGroup(1, 1, BLOCK_TOKENS, 1, chunk_tokens=3 * BLOCK_TOKENS, sliding=True)
STATE = CacheGroup(1, 1, BLOCK_TOKENS, 1, 1, sliding=True, recurrent=True)


def test_a_window_group_needs_and_loads_its_last_blocks_only(make: Make) -> None:
    engine = make(groups=[FULL, WINDOW])
    prompt = tokens(96)
    engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])
    request = Request([*prompt, 1])
    assert engine.find(request) == 96
    results = engine.load(request, [[21, 22, 23, 24, 25, 26], [0, 0, 0, 0, 35, 36]], 96)
    assert not results.failed
    engine.verify(request, [[21, 22, 23, 24, 25, 26], [0, 0, 0, 0, 35, 36]], 96)


def test_blocks_that_vllm_wants_and_nobody_loads_are_computed(make: Make) -> None:
    engine = make(groups=[FULL, WINDOW])
    prompt = tokens(96)
    engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])
    request = Request([*prompt, 1])
    assert engine.find(request) == 96
    # Block 3 of the window group is not null: vLLM would keep it as computed.
    results = engine.load(request, [[21, 22, 23, 24, 25, 26], [0, 0, 0, 34, 35, 36]], 96)
    assert results.failed == {request.request_id}
    assert engine.find(request) == 0


def test_a_hit_ends_where_every_group_can_serve_it(make: Make) -> None:
    engine = make(groups=[FULL, WINDOW])
    prompt = tokens(96)
    # The window group's blocks 4 and 5 were null when the prompt was saved.
    engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 0, 0]])
    request = Request([*prompt, 1])
    assert engine.find(request) == 64


def test_the_null_block_is_never_saved(make: Make) -> None:
    engine = make(groups=[FULL, WINDOW])
    request = Request(tokens(64))
    engine.scheduler.allocated(request, [[1, 2, 3, 4], [0, 0, 5, 6]], 0)
    meta = engine.scheduler.build(
        Step([(request.request_id, [[1, 2, 3, 4], [0, 0, 5, 6]], 0)], [], {request.request_id: 64})
    )
    (job,) = meta.saves
    assert [(part.group, part.blocks) for part in job.parts] == [(0, [1, 2, 3, 4]), (1, [5, 6])]
    assert 0 not in engine.pool.held


def test_a_hit_needs_what_is_before_it_in_its_own_chunk(make: Make) -> None:
    engine = make(groups=[FULL, CHUNKS])
    prompt = tokens(96)
    engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])
    request = Request(prompt)
    assert engine.find(request) == 80
    blocks = [[21, 22, 23, 24, 25], [0, 0, 0, 34, 35]]
    assert not engine.load(request, blocks, 80).failed
    engine.verify(request, blocks, 80)


def test_a_hit_that_ends_with_a_chunk_needs_nothing_of_it(daemon: Daemon, make: Make) -> None:
    engine = make(groups=[FULL, CHUNKS])
    prompt = tokens(96)
    # Of the chunks only the last one's first block was ever there.
    engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6], [0, 0, 0, 14, 0, 0]])
    request = Request([*prompt, 1])
    assert engine.find(request) == 96
    blocks = [[21, 22, 23, 24, 25, 26], [0, 0, 0, 0, 0, 0]]
    assert not engine.load(request, blocks, 96).failed
    engine.verify(request, blocks, 96)
    eventually(lambda: (engine.idle(), daemon.leases() == 0)[1], "no lease is left")
    assert engine.find(Request(prompt)) == 64


def test_less_than_was_offered_is_computed_where_a_group_has_only_that(make: Make) -> None:
    engine = make(groups=[FULL, CHUNKS])
    prompt = tokens(96)
    engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])
    request = Request([*prompt, 1])
    assert engine.find(request) == 96
    results = engine.load(request, [[21, 22, 23, 24, 25], [0, 0, 0, 34, 35]], 80)
    assert results.failed_blocks == {21, 22, 23, 24, 25, 34, 35}


def names_states(engine: Engine, request: Request, blocks: dict[int, int]) -> None:
    """vLLM finds the state after block `at` of a request in block `blocks[at]`."""
    hashes = request.block_hashes
    engine.pool.named |= {hashes[at]: block for at, block in blocks.items()}


def saved(meta: StepMeta, group: int) -> Sequence[int]:
    """Blocks of a group that a step saves."""
    return [
        block
        for job in meta.saves
        for part in job.parts
        for block in part.blocks
        if part.group == group
    ]


def test_a_state_stands_for_all_before_it_and_is_found_where_vllm_names_it(make: Make) -> None:
    engine = make(groups=[FULL, STATE])
    prompt = tokens(96)
    request = Request(prompt)
    names_states(engine, request, {3: 14, 5: 16})
    # The request's table is of no use: vLLM has moved its blocks.
    engine.save(request, [[1, 2, 3, 4, 5, 6], [0, 0, 0, 14, 0, 16]])
    engine.pool.named.clear()
    request = Request([*prompt, 1])
    assert engine.find(request) == 96
    blocks = [[21, 22, 23, 24, 25, 26], [0, 0, 0, 0, 0, 36]]
    assert not engine.load(request, blocks, 96).failed
    engine.verify(request, blocks, 96)
    # Where no state is, no hit ends.
    assert engine.find(Request(prompt)) == 64
    assert engine.find(Request(prompt[:60])) == 0


@pytest.mark.parametrize("length", [96, 100])
def test_a_hit_that_vllm_cuts_by_a_block_ends_where_vllm_keeps_a_state_for_it(
    make: Make, length: int
) -> None:
    engine = make(groups=[FULL, STATE])
    engine.lookup.beyond = BLOCK_TOKENS
    prompt = tokens(length)
    request = Request(prompt)
    # A block before the last whole one, also of a prompt that ends with a block.
    names_states(engine, request, {4: 15})
    engine.save(request, [[1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 15, 0, 17]])
    request = Request(prompt)
    assert engine.find(request) == 80
    blocks = [[21, 22, 23, 24, 25], [0, 0, 0, 0, 35]]
    assert not engine.load(request, blocks, 80).failed
    engine.verify(request, blocks, 80)


def test_a_state_is_saved_in_the_step_after_the_one_that_computes_it(make: Make) -> None:
    engine = make(groups=[FULL, STATE])
    request = Request(tokens(64))
    names_states(engine, request, {3: 14})
    meta = engine.run(request, [[1, 2, 3, 4], [0, 0, 0, 14]])
    assert (saved(meta, 0), saved(meta, 1)) == ([1, 2, 3, 4], [])
    assert engine.scheduler.saves_pending
    assert 14 in engine.pool.held
    meta = engine.scheduler.build(Step([], [], {}))
    assert (saved(meta, 0), saved(meta, 1)) == ([], [14])
    engine.step(meta)
    engine.drain()
    assert not engine.pool.held


def test_a_state_that_vllm_names_a_step_late_is_saved_all_the_same(make: Make) -> None:
    engine = make(groups=[FULL, STATE])
    request = Request(tokens(80))
    engine.scheduler.allocated(request, [[1, 2, 3, 4], [0, 0, 0, 14]], 0)
    name = request.request_id
    engine.step(
        engine.scheduler.build(Step([(name, [[1, 2, 3, 4], [0, 0, 0, 14]], 0)], [], {name: 64}))
    )
    request.num_computed_tokens = 64
    names_states(engine, request, {3: 14, 4: 15})
    engine.step(engine.scheduler.build(Step([], [(name, [[5], [15]])], {name: 16})))
    meta = engine.scheduler.build(Step([], [], {}))
    assert saved(meta, 1) == [14, 15]


def test_states_that_a_reset_makes_worthless_are_let_go(make: Make) -> None:
    engine = make(groups=[FULL, STATE])
    request = Request(tokens(64))
    names_states(engine, request, {3: 14})
    engine.run(request, [[1, 2, 3, 4], [0, 0, 0, 14]])
    engine.scheduler.reset()
    assert not saved(engine.scheduler.build(Step([], [], {})), 1)
    engine.drain()
    assert not engine.pool.held


def test_a_model_of_nothing_but_state_is_asked_for_no_prefix(make: Make) -> None:
    engine = make(groups=[CacheGroup(1, 1, BLOCK_TOKENS, 1, 1, sliding=True, recurrent=True)])
    prompt = tokens(96)
    request = Request(prompt)
    names_states(engine, request, {3: 14})
    engine.save(request, [[0, 0, 0, 14, 0, 16]])
    assert engine.find(Request(prompt)) == 64
