"""Counters of the connector, as vLLM's logs and Prometheus take them."""

from __future__ import annotations

from collections.abc import Mapping

#: Counters and what they count. They are added up over ranks and steps.
COUNTERS: dict[str, str] = {
    "queries": "Requests that asked the daemon for cached blocks.",
    "query_misses": "Queries without a hit.",
    "query_timeouts": "Queries that were given up for want of an answer.",
    "hit_blocks": "Blocks that queries found cached.",
    "loads": "Loads that ended, of all ranks.",
    "load_failures": "Loads that failed, of all ranks; their blocks are recomputed.",
    "loaded_blocks": "Blocks loaded, of all ranks.",
    "loaded_bytes": "Bytes loaded, of all ranks.",
    "failed_load_blocks": "Blocks that a failed load left undefined, of all ranks.",
    "saves": "Saves that ended, of all ranks.",
    "save_failures": "Saves that failed, of all ranks.",
    "saved_blocks": "Blocks newly stored, of all ranks.",
    "saved_bytes": "Bytes saved, of all ranks.",
    "skipped_blocks": "Blocks to be saved that were held already, of all ranks.",
    "dropped_blocks": "Blocks that were not stored, of all ranks.",
    "unsaved_blocks": "Blocks not offered because too many saves were under way.",
    "daemon_losses": "Times that a process of this engine lost the daemon.",
    "daemon_returns": "Times that a process of this engine found the daemon again.",
}


class Counters:
    """Counts between two reports."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Counts; `name` is one of COUNTERS."""
        assert name in COUNTERS, name
        if amount:
            self._values[name] = self._values.get(name, 0) + amount

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        values, self._values = self._values, {}
        return values


def added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The sum of two reports."""
    total = dict(one)
    for name, amount in other.items():
        total[name] = total.get(name, 0) + amount
    return total
