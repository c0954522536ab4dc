"""KV events: tells vLLM's event publisher which blocks are in the node's cache.

The daemon tells nobody what it evicts later, so there are no events of removal: who routes by these
events treats them as hints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pegaflow.connector.groups import CacheGroup

#: The medium that vLLM's own offloading names for host memory.
MEDIUM = "CPU"


@dataclass(frozen=True)
class Stored:
    """Consecutive blocks of a request that every rank has saved."""

    hashes: list[bytes]
    parent: bytes | None
    token_ids: list[int]
    block_tokens: int
    lora_name: str | None
    group_index: int


def stored(request: Any, group: CacheGroup, first: int, last: int) -> Stored:
    """Blocks `first` to `last - 1` of a request of vLLM, as they will be told once they are
    saved."""
    names = group.names(request.block_hashes, first, last)
    parent = group.names(request.block_hashes, first - 1, first)[0] if first else None
    lora = getattr(request, "lora_request", None)
    size = group.block_tokens
    return Stored(
        list(names),
        parent,
        list(request.all_token_ids[first * size : last * size]),
        size,
        getattr(lora, "lora_name", None),
        group.index,
    )
