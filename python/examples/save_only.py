"""Fills the node's cache beside another connector, which alone answers vLLM's questions.

    pegaflowd --pool-size 4GiB &
    export PYTHONHASHSEED=0
    python save_only.py Qwen/Qwen3-0.6B save     # saves, asks nothing
    python save_only.py Qwen/Qwen3-0.6B load     # finds and loads

After that, further arguments of `vllm.LLM` may follow as JSON.

In MultiConnector the first connector that finds blocks loads them; all of them save. In the mode
save_only PegaFlow never finds any, and does not ask the daemon.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.platforms import current_platform

PROMPT = "The following is a long list of facts about the sea. " * 100


def pegaflow(mode: str) -> dict[str, Any]:
    """The connector in a mode."""
    return {
        "kv_connector": "PegaKVConnector",
        "kv_connector_module_path": "pegaflow.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"pegaflow.mode": mode},
    }


def other() -> dict[str, Any]:
    """The connector that answers: vLLM's offloading, which needs a GPU, else its example."""
    if current_platform.is_cuda_alike():
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 30},
        }
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": tempfile.mkdtemp()},
    }


def save_only() -> KVTransferConfig:
    """The other one answers, PegaFlow saves along."""
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": [other(), pegaflow("save_only")]},
    )


def main() -> None:
    """Answers one prompt in the mode that the command line names."""
    model, what = sys.argv[1:3]
    config = (
        save_only()
        if what == "save"
        else KVTransferConfig(**pegaflow("read_write"), kv_load_failure_policy="recompute")
    )
    more = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    llm = LLM(model=model, **more, disable_log_stats=False, kv_transfer_config=config)
    (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=16))
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    loaded = found["vllm:external_prefix_cache_hits"]
    print(f"{what}: {loaded} tokens loaded: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
