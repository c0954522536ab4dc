"""Engines of several ranks: each worker saves and loads its own part, and all or none is a hit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.place import connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences


@pytest.mark.parametrize(
    "arguments",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}],
    ids=["tensor parallel", "pipeline parallel"],
)
def test_two_ranks_save_and_load_together(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm], arguments: dict[str, int]
) -> None:
    prompts = families(12, seed=60, each=3)
    wanted = reference.outputs(prompts)
    engine = vllm("ranks", multiprocess=True)
    engine.open(
        distributed_executor_backend="mp", kv_transfer_config=connector(), **arguments
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
