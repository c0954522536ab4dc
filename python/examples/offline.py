"""Offline inference with the node's cache.

    pegaflowd --pool-size 4GiB &
    PYTHONHASHSEED=0 python offline.py Qwen/Qwen3-0.6B

Run it twice: the second process finds what the first one saved. After the model, further arguments
of `vllm.LLM` may follow as JSON, such as '{"max_model_len": 4096}'.
"""

from __future__ import annotations

import json
import sys
import time

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

PROMPT = "The following is a long list of facts about the sea. " * 100


def main() -> None:
    """Generates twice and says what came from the cache."""
    llm = LLM(
        model=sys.argv[1],
        **(json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}),
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="PegaKVConnector",
            kv_connector_module_path="pegaflow.connector",
            kv_role="kv_both",
            # Compute what cannot be loaded, instead of failing the request.
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"pegaflow.autostart": True},
        ),
    )
    for name in ("first", "second"):
        began = time.perf_counter()
        (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=16))
        took = time.perf_counter() - began
        found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        print(
            f"{name}: {took:.3f} s, {found['vllm:external_prefix_cache_hits']} tokens loaded so"
            f" far: {output.outputs[0].text!r}"
        )
        # What vLLM itself keeps would answer the second run before the node's cache is asked.
        while not llm.reset_prefix_cache():
            time.sleep(0.01)


if __name__ == "__main__":
    main()
