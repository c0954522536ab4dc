"""Modes: a replica that only saves, and one that reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.vllm.daemon import Daemon
from tests.vllm.place import connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences

EXTERNAL = "vllm:external_prefix_cache_hits"


def beside_another(first: dict[str, Any]) -> dict[str, Any]:
    """A MultiConnector of the given one and one of vLLM's own, which loads."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "connectors": [
                first,
                {
                    "kv_connector": "OffloadingConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28},
                },
            ]
        },
    }


def traffic(daemon: Daemon) -> dict[str, int]:
    """Requests of each kind that the daemon has answered."""
    return {op: daemon.counter("requests", op=op) for op in ("query", "load", "save")}


def test_save_only_saves_without_a_query_and_the_next_replica_hits(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    prompts = families(12, seed=40, each=3)
    wanted = reference.outputs(prompts)

    saver = vllm("saver")
    saver.open(kv_transfer_config=beside_another(connector(**{"pegaflow.mode": "save_only"})))
    assert differences(saver.run(prompts).tokens, wanted) == []
    daemon.settle()
    assert saver.reset()
    # Again, where a connector that loads would ask: this one does not.
    assert differences(saver.run(prompts).tokens, wanted) == []
    daemon.settle()
    saver.stop()
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
