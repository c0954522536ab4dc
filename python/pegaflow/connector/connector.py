"""`PegaKVConnector`: vLLM's interface, handed on to the scheduler's and the worker's side."""

# vLLM is where this runs, not where it is checked.
# mypy: disable-error-code="import-not-found,misc"

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from pegaflow.connector import compat
from pegaflow.connector.config import ConnectorConfig, parse
from pegaflow.connector.engine import SchedulerEnd, WorkerEnd
from pegaflow.connector.meta import StepMeta, WorkerReport
from pegaflow.connector.prometheus import PegaPromMetrics, PegaStats


class PegaMetadata(KVConnectorMetadata):
    """What the workers do in a step."""

    def __init__(self, step: StepMeta) -> None:
        self.step = step


class PegaWorkerMetadata(KVConnectorWorkerMetadata):
    """What the workers are through with."""

    def __init__(self, report: WorkerReport) -> None:
        self.report = report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, PegaWorkerMetadata)
        return PegaWorkerMetadata(self.report.aggregate(other.report))


class PegaHandshake(KVConnectorHandshakeMetadata):
    """The namespace that a rank registered."""

    def __init__(self, namespace: dict[str, str | int | None]) -> None:
        self.namespace = namespace


class PegaKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Saves computed blocks to the node's daemon, and loads those of prompts seen before."""

    #: Where vLLM's metrics say that hits came from.
    _cache_hit_source = compat.HIT_SOURCE

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config, notes = parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._config: ConnectorConfig = config
        self._scheduler: SchedulerEnd | None = None
        self._worker: WorkerEnd | None = None
        if role == KVConnectorRole.SCHEDULER:
            for note in notes:
                compat.logger().warning("%s", note)
            self._scheduler = SchedulerEnd(config, vllm_config, kv_cache_config)
        else:
            self._worker = WorkerEnd(config, vllm_config, kv_cache_config)

    # ------------------------------------------------------------ both

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.shutdown()
        if self._worker is not None:
            self._worker.shutdown()

    def get_kv_connector_stats(self) -> PegaStats | None:
        end = self._scheduler or self._worker
        assert end is not None
        counted = end.counted()
        return PegaStats(counted) if counted else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PegaStats:
        return PegaStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PegaPromMetrics:
        return PegaPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Newer releases: the layout that has all layers of a block side by side, on a GPU."""
        config, _ = parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        # Who only saves along leaves the choice to the connector that loads.
        wanted = config.cross_layer_blocks and config.mode.loads
        return compat.cross_layer_layout() if wanted else None

    # ------------------------------------------------------------ worker

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """All layers of a block side by side: one large copy in place of many small ones."""
        return self._config.cross_layer_blocks

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._as_worker().register(kv_caches)

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        self._as_worker().register_cross_layers(kv_cache, attn_backend)

    def unregister_kv_caches(self) -> None:
        self._as_worker().suspend()

    def restore_kv_caches(self) -> None:
        self._as_worker().resume()

    def get_handshake_metadata(self) -> PegaHandshake | None:
        namespace = self._as_worker().namespace_for_scheduler()
        return None if namespace is None else PegaHandshake(namespace)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Nothing: blocks that are being saved have a reference of their own, so a preemption does
        not free them, and nobody has to wait."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._as_worker().start_loads(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is scheduled only once all its blocks are loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: whole blocks are saved after the step."""

    def wait_for_save(self) -> None:
        self._as_worker().start_saves(self._step())

    def clear_connector_metadata(self) -> None:
        # Older releases do not call `wait_for_save` in a step without tokens. Blocks that are held
        # for a save that never begins would be held for ever.
        if self._worker is not None and self.has_connector_metadata():
            self._worker.start_saves(self._step())
        super().clear_connector_metadata()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._as_worker().results().loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Only newer releases of vLLM call this; older ones call `get_finished`."""
        worker = self._as_worker()
        results = worker.results()
        failed = results.failed if worker.names_failed_requests else set()
        return compat.transfer_results(results.loaded, failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._as_worker().failed_blocks()

    def build_connector_worker_meta(self) -> PegaWorkerMetadata | None:
        report = self._as_worker().report()
        return None if report is None else PegaWorkerMetadata(report)

    # ------------------------------------------------------------ scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._as_scheduler().bind(gpu_block_pool)

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        self._as_scheduler().handshake(
            [one.namespace for one in metadata.values() if isinstance(one, PegaHandshake)]
        )

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._as_scheduler().handshake(
            [one.namespace for one in metadata.values() if isinstance(one, PegaHandshake)]
        )

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._as_scheduler().matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._as_scheduler().allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> PegaMetadata:
        return PegaMetadata(self._as_scheduler().build(compat.step_of(scheduler_output)))

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, PegaWorkerMetadata):
            self._as_scheduler().report(meta.report)
        if loaded := self._as_scheduler().loaded():
            told = connector_output.finished_recving or set()
            connector_output.finished_recving = told | loaded

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._as_scheduler().finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._as_scheduler().finished(request)
        return False, None

    def take_events(self) -> Iterable[Any]:
        return [compat.stored_event(event) for event in self._as_scheduler().events()]

    def has_pending_push_work(self) -> bool:
        """Keeps an idle engine stepping until the saves under way have given their blocks back."""
        return self._as_scheduler().saves_pending

    def has_pending_block_frees(self) -> bool:
        return self._as_scheduler().frees_pending

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not saved is a later miss, nothing more."""
        return False

    def reset_cache(self) -> bool:
        self._as_scheduler().reset()
        return True

    # ------------------------------------------------------------ roles

    def _as_scheduler(self) -> SchedulerEnd:
        assert self._scheduler is not None, "a method of the scheduler called on a worker"
        return self._scheduler

    def _as_worker(self) -> WorkerEnd:
        assert self._worker is not None, "a method of a worker called on the scheduler"
        return self._worker

    def _step(self) -> StepMeta:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, PegaMetadata)
        return metadata.step


compat.make_known(PegaKVConnector.__name__, "pegaflow.connector")
