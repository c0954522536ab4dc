"""Modes: a replica that only saves, and one that reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vllm.daemon import Daemon
from tests.vllm.place import Place, connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences

EXTERNAL = "vllm:external_prefix_cache_hits"


def behind_another(last: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A MultiConnector of vLLM's own example, which answers queries, and the given one."""
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "example")},
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [example, last]},
    }


def traffic(daemon: Daemon) -> dict[str, int]:
    """Requests of each kind that the daemon has answered."""
    return {op: daemon.counter("requests", op=op) for op in ("query", "load", "save")}


def test_save_only_saves_without_a_query_and_the_next_replica_hits(
    reference: Reference, daemon: Daemon, place: Place, vllm: Callable[..., Vllm]
) -> None:
    # No two alike in all their whole blocks: vLLM's example would load one's blocks for the other,
    # which it can do in one layout only.
    prompts = families(12, seed=40, each=3, suffix=(40, 150))
    wanted = reference.outputs(prompts)

    saver = vllm("saver", multiprocess=True)
    save_only = connector(**{"pegaflow.mode": "save_only"})
    saver.open(
        distributed_executor_backend="uni",
        kv_transfer_config=behind_another(save_only, place.folder),
    )
    assert differences(saver.run(prompts).tokens, wanted) == []
    daemon.settle()
    saver.stop()
    alone = vllm("alone")
    alone.open(kv_transfer_config=save_only)
    for _ in range(2):
        # The second time a connector that loads would find everything: this one does not ask.
        assert alone.reset()
        assert differences(alone.run(prompts).tokens, wanted) == []
    assert alone.metrics()[EXTERNAL] == 0
    daemon.settle()
    alone.stop()
    first = traffic(daemon)
    assert first["save"] > 0
    assert (first["query"], first["load"]) == (0, 0)

    reader = vllm("reader")
    reader.open(kv_transfer_config=connector(**{"pegaflow.mode": "read_write"}))
    outcome = reader.run(prompts)
    assert differences(outcome.tokens, wanted) == []
    assert outcome.cached == [reusable(prompt, 32) for prompt in prompts]
    assert reader.metrics()[EXTERNAL] > 0
    second = traffic(daemon)
    assert second["query"] > 0
    assert second["load"] > 0


def test_load_only_loads_and_saves_nothing(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    known, unknown = families(4, seed=41, each=2), families(4, seed=42, each=2)
    engine = vllm("modes")
    engine.open(kv_transfer_config=connector())
    engine.run(known)
    daemon.settle()
    engine.close()

    engine.open(kv_transfer_config=connector(**{"pegaflow.mode": "load_only"}))
    saves = traffic(daemon)["save"]
    outcome = engine.run(known + unknown)
    assert differences(outcome.tokens, reference.outputs(known + unknown)) == []
    assert outcome.cached[: len(known)] == [reusable(prompt, 32) for prompt in known]
    daemon.settle()
    assert traffic(daemon)["save"] == saves
