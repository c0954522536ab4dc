"""A cache that is too small, and requests that go away while their blocks are on the way."""

from __future__ import annotations

import random
import threading
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
    engine.open(
        num_gpu_blocks_override=200,
        distributed_executor_backend="uni",
        kv_transfer_config=connector(),
    )
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


def test_blocks_of_an_aborted_load_are_not_given_away_while_the_daemon_may_write_them(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    loaded = families(8, seed=32, prefix=(500, 900), suffix=(1, 60), each=1)
    computed = families(8, seed=33, prefix=(500, 900), suffix=(1, 60), each=1)
    wanted = reference.outputs(computed)
    engine = vllm("frozen")
    # Blocks for half of all prompts: what is freed is given to the next one at once.
    engine.open(num_gpu_blocks_override=190, kv_transfer_config=connector())
    for prompt in loaded:
        engine.run([prompt], max_tokens=1)
    daemon.settle()
    # The daemon stops at a moment that no one chooses, and goes on when the loads that it has not
    # finished belong to nobody any more.
    for delay_ms in (0, 5, 10, 15, 20, 30, 40, 60):
        assert engine.reset()
        later = threading.Timer(delay_ms / 1e3, daemon.freeze)
        thaw = threading.Timer(delay_ms / 1e3 + 0.4, daemon.thaw)
        later.start()
        thaw.start()
        outcome = engine.run(
            loaded + computed, aborts=list(range(len(loaded))), abort_after_steps=3
        )
        thaw.join()
        assert outcome.failed == []
        assert differences(outcome.tokens[len(loaded) :], wanted) == []
    daemon.settle()
    assert daemon.pegactl("status")["blocks_pinned"] == 0
