"""The counters as vLLM's statistics and Prometheus metrics."""

# vLLM is where this runs, not where it is checked.
# mypy: disable-error-code="import-not-found,misc"

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from pegaflow.connector.stats import COUNTERS, added


@dataclass
class PegaStats(KVConnectorStats):
    """What was counted in an interval: numbers by name, added up over ranks and steps."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return PegaStats(added(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class PegaPromMetrics(KVConnectorPromMetrics):
    """`vllm:pegaflow_..._total`, for each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            metric = counter(
                name=f"vllm:pegaflow_{name}", documentation=text, labelnames=labelnames
            )
            self._counters[name] = {
                engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            engines = self._counters.get(name)
            if engines is not None:
                engines[engine_idx].inc(amount)
