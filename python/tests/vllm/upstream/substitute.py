"""A plugin for vLLM's own tests: where they take a connector of no matter what kind, they get this
project's.

Loaded by name (`pytest -p substitute`) with this folder on the path, because vLLM's tests have a
package `tests` of their own.
"""

from __future__ import annotations

import importlib
from typing import Any

UNIT = "tests.v1.kv_connector.unit"

#: What `create_vllm_config` of vLLM's tests gives to tests that name no connector.
OURS: dict[str, Any] = {
    "kv_connector": "PegaKVConnector",
    "kv_connector_module_path": "pegaflow.connector",
    "kv_role": "kv_both",
}


def pytest_configure(config: Any) -> None:
    """Before any test module runs."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from pegaflow.connector import PegaKVConnector
    from pegaflow.connector.connector import PegaMetadata
    from pegaflow.connector.meta import StepMeta

    config.addinivalue_line("markers", "cpu_test: runs without a GPU")
    utils: Any = importlib.import_module(f"{UNIT}.utils")
    create = utils.create_vllm_config

    def create_vllm_config(*args: Any, **kwargs: Any) -> Any:
        if not args and "kv_connector" not in kwargs:
            kwargs = OURS | kwargs
        return create(*args, **kwargs)

    class Ours(PegaKVConnector):
        """A model without a KV cache is refused at start; where a test has one, it gets a group."""

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            if not kv_cache_config.kv_cache_groups:
                attention = FullAttentionSpec(
                    block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32
                )
                kv_cache_config = KVCacheConfig(
                    num_blocks=1,
                    kv_cache_tensors=[],
                    kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)],
                )
            super().__init__(vllm_config, role, kv_cache_config)

    # The wrapper that records calls (TestExampleConnector) makes one of these, and records.
    utils.ExampleConnector = Ours
    utils.create_vllm_config = create_vllm_config
    lifecycle: Any = importlib.import_module(f"{UNIT}.test_kv_connector_lifecycle")
    lifecycle.ExampleConnectorMetadata = lambda: PegaMetadata(StepMeta([], []))
