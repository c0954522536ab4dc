"""Saved cold, loaded after a restart of vLLM: the same outputs, and hits as computed by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.place import connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences

LOCAL = "vllm:prefix_cache_hits"
EXTERNAL = "vllm:external_prefix_cache_hits"


@pytest.mark.parametrize(
    ("block", "multiprocess"),
    [(32, True), (64, False), (128, False)],
    ids=[
        "blocks of 32, three processes",
        "blocks of 64, one process",
        "blocks of 128, one process",
    ],
)
def test_50_prompts_are_answered_alike_cold_and_after_a_restart(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm], block: int, multiprocess: bool
) -> None:
    prompts = families(50, seed=10 + block)
    wanted = reference.outputs(prompts)
    # Longer prompts are cut into chunks that end inside blocks.
    arguments = {
        "block_size": block,
        "max_num_batched_tokens": 240,
        "max_num_seqs": 24,
        "num_gpu_blocks_override": 20_000 // block,
        "kv_transfer_config": connector(),
    }

    cold = vllm("cold", multiprocess=multiprocess)
    cold.open(**arguments)
    assert differences(cold.run(prompts).tokens, wanted) == []
    daemon.settle()
    cold.stop()
    assert daemon.sealed() > sum(len(prompt) // block for prompt in prompts) // 3

    warm = vllm("warm", multiprocess=multiprocess)
    warm.open(**arguments)
    again = warm.run(prompts)
    assert differences(again.tokens, wanted) == []
    assert again.cached == [reusable(prompt, block) for prompt in prompts]
    metrics = warm.metrics()
    assert metrics[LOCAL] + metrics[EXTERNAL] == sum(reusable(prompt, block) for prompt in prompts)

    # One by one, with vLLM's own cache empty: every hit is an external one.
    for prompt, sure in list(zip(prompts, wanted, strict=True))[:8]:
        assert warm.reset()
        before = warm.metrics()
        alone = warm.run([prompt])
        assert differences(alone.tokens, [sure]) == []
        after = warm.metrics()
        assert after[EXTERNAL] - before[EXTERNAL] == reusable(prompt, block)
        assert after[LOCAL] == before[LOCAL]


def test_what_was_generated_is_found_by_the_next_turn(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    prompt = families(1, seed=20, prefix=(70, 70), suffix=(5, 5))[0]
    engine = vllm("turns")
    engine.open(kv_transfer_config=connector())
    answer = engine.run([prompt], max_tokens=100).tokens[0]
    daemon.settle()
    turn = prompt + answer + [5, 6, 7]
    assert engine.reset()
    before = engine.metrics()
    outputs = engine.run([turn]).tokens
    # The last generated token was never computed, so its block may be missing, but no other.
    computed = (len(prompt) + len(answer) - 1) // 32 * 32
    assert engine.metrics()[EXTERNAL] - before[EXTERNAL] == computed
    assert differences(outputs, reference.outputs([turn])) == []


def test_no_hit_crosses_a_cache_salt(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    prompt = families(1, seed=21, prefix=(200, 200))[0]
    engine = vllm("salts")
    engine.open(kv_transfer_config=connector())
    hits = []
    for salt in ("one", "two", None, "one", "two", None):
        assert engine.reset()
        before = engine.metrics()[EXTERNAL]
        outputs = engine.run([prompt], cache_salt=salt).tokens
        assert differences(outputs, reference.outputs([prompt])) == []
        hits.append(engine.metrics()[EXTERNAL] - before)
        daemon.settle()
    assert hits == [0, 0, 0] + [reusable(prompt, 32)] * 3
