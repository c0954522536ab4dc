"""The vLLM connector: `PegaKVConnector` for vLLM's `--kv-transfer-config`.

`docs/vllm.md` has modes, settings and limits. Everything but `connector` and `compat` works without
vLLM; `PegaKVConnector` is imported only when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pegaflow.connector.connector import PegaKVConnector

__all__ = ["PegaKVConnector"]


def __getattr__(name: str) -> Any:
    if name == "PegaKVConnector":
        from pegaflow.connector.connector import PegaKVConnector

        return PegaKVConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
