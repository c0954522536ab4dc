"""Two replicas of one model share the node's daemon: what one computed, the other loads.

    pegaflowd --pool-size 4GiB &
    python two_replicas.py Qwen/Qwen3-0.6B

Each replica is a process of its own. On one GPU give both less of its memory than half. After the
model, further arguments of `vllm.LLM` may follow as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from typing import Any

PROMPT = "The following is a long list of facts about the sea. " * 100


def replica(model: str, more: dict[str, Any], name: str, turn: Any, done: Any) -> None:
    """Waits for its turn and answers the prompt."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        **{"gpu_memory_utilization": 0.4, **more},
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="PegaKVConnector",
            kv_connector_module_path="pegaflow.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
    )
    turn.wait()
    (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=16))
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    loaded = found["vllm:external_prefix_cache_hits"]
    print(f"{name}: {loaded} tokens loaded: {output.outputs[0].text!r}", flush=True)
    done.set()


def main() -> None:
    """Starts both, then lets them answer one after the other."""
    # Block names begin with this seed: both replicas need the same.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    context = multiprocessing.get_context("spawn")
    first_turn, second_turn, ended = (context.Event() for _ in range(3))
    first_turn.set()
    model, more = sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    processes = [
        context.Process(target=replica, args=(model, more, "first", first_turn, second_turn)),
        context.Process(target=replica, args=(model, more, "second", second_turn, ended)),
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
