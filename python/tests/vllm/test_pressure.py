"""A cache that is too small, and requests that go away while their blocks are on the way."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.place import connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families
from tests.vllm.reference import Reference, differences


def test_preemption_changes_no_output(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    prompts = families(24, seed=30, each=4, prefix=(60, 200), suffix=(1, 40))
    wanted = reference.outputs(prompts, max_tokens=80)
    engine = vllm("small")
    # 40 blocks hold about six of these requests to their ends, and let in far more.
    engine.open(
        num_gpu_blocks_override=40, max_num_batched_tokens=256, kv_transfer_config=connector()
    )
    for _ in range(2):
        assert differences(engine.run(prompts, max_tokens=80).tokens, wanted) == []
        daemon.settle()
    metrics = engine.metrics()
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:external_prefix_cache_hits"] > 0
    assert engine.reset(), "blocks are still held after all requests have ended"


@pytest.mark.parametrize("multiprocess", [False, True], ids=["one process", "engine core apart"])
def test_aborts_in_mid_load_leak_nothing_and_disturb_nobody(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm], multiprocess: bool
) -> None:
    prompts = families(16, seed=31, prefix=(300, 600), suffix=(1, 60), each=1)
    wanted = reference.outputs(prompts)
    generator = random.Random(7)
    engine = vllm("aborts", multiprocess=multiprocess)
    engine.open(num_gpu_blocks_override=200, kv_transfer_config=connector())
    engine.run(prompts, max_tokens=1)
    daemon.settle()
    for trial in range(12):
        assert engine.reset(), f"blocks are still held after trial {trial}"
        aborts = generator.sample(range(len(prompts)), 8)
        outcome = engine.run(prompts, aborts=aborts, abort_after_steps=trial % 6)
        assert outcome.failed == []
        left = [at for at in range(len(prompts)) if at not in aborts]
        got = [outcome.tokens[at] for at in left]
        assert differences(got, [wanted[at] for at in left]) == []
    assert daemon.counter("load_shards", outcome="loaded") > 0
    daemon.settle()
    status = daemon.pegactl("status")
    assert (status["leases"], status["blocks_pinned"]) == (0, 0)
