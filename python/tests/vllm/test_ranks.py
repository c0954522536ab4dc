"""Engines of several ranks: each worker saves and loads its own part, and all or none is a hit."""

from __future__ import annotations

from collections.abc import Callable

from tests.vllm.daemon import Daemon
from tests.vllm.place import connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences


def test_two_ranks_save_and_load_together(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    prompts = families(12, seed=60, each=3)
    wanted = reference.outputs(prompts)
    engine = vllm("ranks", multiprocess=True)
    # Pipeline ranks are not tried: vLLM 0.32 fails an assertion of its own with them on CPUs.
    engine.open(
        tensor_parallel_size=2, distributed_executor_backend="mp", kv_transfer_config=connector()
    )
    assert differences(engine.run(prompts).tokens, wanted) == []
    # The scheduler's session and one for each worker.
    assert len(daemon.pegactl("sessions")["sessions"]) == 3
    daemon.settle()
    assert engine.reset()
    again = engine.run(prompts)
    assert differences(again.tokens, wanted) == []
    assert again.cached == [reusable(prompt, 32) for prompt in prompts]
    assert daemon.counter("load_shards", outcome="failed") == 0
