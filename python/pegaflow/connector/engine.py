"""The two ends of an engine: each has a client of the daemon and the logic of its side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pegaflow.client import Client, Group, Memory, Mode, Order, StatusError
from pegaflow.connector import compat, handover
from pegaflow.connector.blocks import PoolHolder
from pegaflow.connector.config import ConnectorConfig, ConnectorMode
from pegaflow.connector.describe import known_by_name_alone, namespace_of
from pegaflow.connector.events import Stored
from pegaflow.connector.layout import GroupLayout, Layer, LayoutError, group_layout, to_group
from pegaflow.connector.lookup import Lookup
from pegaflow.connector.meta import StepMeta, WorkerReport
from pegaflow.connector.names import Adapters
from pegaflow.connector.namespace import from_wire, to_wire
from pegaflow.connector.scheduler import Scheduler, Step
from pegaflow.connector.session import Watch, connect
from pegaflow.connector.worker import Results, Worker


def _instance(config: ConnectorConfig, vllm_config: Any) -> str:
    """One engine's processes find each other by its id. A second connector of the same engine (in
    a MultiConnector) has another mode."""
    return f"{vllm_config.kv_transfer_config.engine_id}/{config.mode.value}"[:128]


def _mode(config: ConnectorConfig) -> Mode:
    return Mode.SAVE_ONLY if config.mode is ConnectorMode.SAVE_ONLY else Mode.READ_WRITE


class SchedulerEnd:
    """In the process of vLLM's scheduler."""

    def __init__(self, config: ConnectorConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = config
        self._logger = compat.logger()
        self._instance = _instance(config, vllm_config)
        self._world_size = int(vllm_config.parallel_config.world_size)
        self._groups = compat.cache_groups(vllm_config, kv_cache_config)
        self._drops_last_block = compat.drops_last_block(vllm_config)
        events = getattr(vllm_config, "kv_events_config", None)
        self._scheduler = Scheduler(
            config,
            self._groups,
            self._world_size,
            self._logger,
            with_events=bool(getattr(events, "enable_kv_cache_events", False)),
            adapters=Adapters(by_path=compat.names_adapter_paths()),
        )
        self._handover: handover.HandOver | None = None
        self._client: Client | None = None
        self._watch: Watch | None = None
        seed = compat.hash_seed(str(vllm_config.cache_config.prefix_caching_hash_algo))
        if seed.value is None:
            self._logger.warning(
                "vLLM's block hashes begin with a random seed: nothing is shared with other vLLM"
                " processes, nor after a restart. To share, %s.",
                seed.fix,
            )
        policy = getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", None)
        if config.mode.loads and policy == "fail":
            self._logger.warning(
                'kv_load_failure_policy is "fail": a request whose load fails, for example because'
                ' the daemon is restarted, fails. With "recompute" it is computed instead.'
            )

    def handshake(self, namespaces: Sequence[Mapping[str, str | int | None]]) -> None:
        """The workers have registered under this namespace: now the daemon can be asked."""
        if self._scheduler.attached or not self._config.mode.loads or not namespaces:
            return
        first = namespaces[0]
        if any(other != first for other in namespaces[1:]):
            raise RuntimeError(f"ranks of one engine differ in their namespace: {namespaces}")
        client = connect(self._config, f"vllm scheduler {os.getpid()}", self._logger)
        try:
            registration = client.register_scheduler(
                self._instance,
                from_wire(first),
                world_size=self._world_size,
                mode=_mode(self._config),
            )
        except StatusError:
            client.close()
            raise
        self._client = client
        self._watch = Watch(client)
        self._scheduler.attach(
            Lookup(
                client,
                registration,
                self._groups,
                self._config,
                self._scheduler.counters,
                self._logger,
                drops_last_block=self._drops_last_block,
            )
        )

    def bind(self, pool: Any) -> None:
        """vLLM's block pool. By now the workers have registered."""
        self._scheduler.bind(PoolHolder(pool))
        self._handover = handover.accept(self._instance)

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """See `Scheduler.matched`."""
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        return self._scheduler.matched(request, computed)

    def allocated(self, request: Any, blocks: Sequence[Sequence[int]], external: int) -> None:
        """See `Scheduler.allocated`."""
        self._scheduler.allocated(request, blocks, external)

    def build(self, step: Step) -> StepMeta:
        """See `Scheduler.build`."""
        return self._scheduler.build(step)

    def report(self, report: WorkerReport) -> None:
        """What the workers say; in their first report, where no handshake brought it, also the
        namespace."""
        if report.namespaces:
            try:
                self.handshake(report.namespaces)
            except StatusError as error:
                # The engine is at work by now, and can do without.
                self._logger.error("nothing is looked up until the next start: %s", error)
        self._scheduler.report(report)

    def loaded(self) -> set[str]:
        """Requests whose blocks are there, of which vLLM has not been told."""
        return set() if self._handover is None else self._handover.take()

    def finished(self, request: Any) -> None:
        """See `Scheduler.finished`."""
        self._scheduler.finished(request)

    @property
    def saves_pending(self) -> bool:
        """See `Scheduler.saves_pending`."""
        return self._scheduler.saves_pending

    @property
    def frees_pending(self) -> bool:
        """See `Scheduler.frees_pending`."""
        return self._scheduler.frees_pending

    def events(self) -> list[Stored]:
        """See `Scheduler.events`."""
        return self._scheduler.events()

    def reset(self) -> None:
        """See `Scheduler.reset`."""
        self._scheduler.reset()

    def counted(self) -> dict[str, int]:
        """What was counted since the last call."""
        if self._watch is not None:
            self._watch.count(self._scheduler.counters)
        return self._scheduler.counters.take()

    def shutdown(self) -> None:
        """Ends the session."""
        if self._client is not None:
            self._client.close()


class WorkerEnd:
    """In the process of a worker."""

    def __init__(self, config: ConnectorConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._logger = compat.logger()
        # Refuses what is not supported before any memory is looked at.
        self._groups = compat.cache_groups(vllm_config, kv_cache_config)
        sleeps = bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))
        if sleeps and not compat.TELLS_OF_SLEEP:
            raise LayoutError(
                "sleep mode is not supported with this vLLM, which does not tell connectors that"
                " the KV cache's memory goes: use 0.33 or later"
            )
        inside = compat.begins_at_zero_only(vllm_config) if config.mode.loads else None
        if inside is not None:
            raise LayoutError(inside)
        # Numbers of blocks say nothing of several groups. And a window cannot be computed from a
        # block in its middle on: what it needs before was never loaded.
        self.names_failed_requests = len(self._groups) > 1 or self._groups[0].sliding
        if config.mode.loads and self.names_failed_requests and not compat.HAS_TRANSFER_RESULTS:
            raise LayoutError(
                "this vLLM cannot be told that the load of a request with several cache groups, or"
                " with sliding windows, failed: use a newer one, or pegaflow.mode=save_only"
            )
        self._worker: Worker | None = None
        self._device = "cpu"
        self._failed_blocks: set[int] = set()
        self._idle = False
        self._lingers = False
        self._handover: handover.HandOver | None = None

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Registers the tensors of the layers."""
        blocks = int(self._kv_cache_config.num_blocks)
        described = []
        for group, own in zip(self._groups, self._kv_cache_config.kv_cache_groups, strict=True):
            layers = compat.layers_of(kv_caches, list(own.layer_names), blocks)
            described.append((group.number, own.kv_cache_spec, group_layout(layers, blocks)))
        self._connect(described)

    def register_cross_layers(self, tensor: Any, backend: Any) -> None:
        """Registers one tensor that has all layers of a block side by side."""
        blocks = int(self._kv_cache_config.num_blocks)
        (own,) = self._kv_cache_config.kv_cache_groups
        layer = Layer("all layers", tensor, compat.cross_layer_dim(backend))
        self._connect([(0, own.kv_cache_spec, group_layout([layer], blocks))])

    def _connect(self, described: list[tuple[int, Any, GroupLayout]]) -> None:
        blocks = int(self._kv_cache_config.num_blocks)
        rank = compat.rank_of(self._vllm_config)
        groups: list[Group] = []
        texts: list[str] = []
        for number, spec, layout in sorted(described, key=lambda one: one[0]):
            replicated = compat.is_replicated(self._vllm_config, spec)
            groups.append(to_group(layout, number, blocks, replicated=replicated))
            texts.append(compat.described(spec))
        # All ranks have one namespace; what each has of the layers, the daemon sees by their sizes.
        staged = int(self._vllm_config.parallel_config.pipeline_parallel_size) > 1
        layout_text = "|".join(
            layout.of_any_stage if staged else layout.fingerprint
            for _, _, layout in sorted(described, key=lambda one: one[0])
        )
        namespace = namespace_of(
            self._config,
            self._vllm_config,
            compat.hash_seed(str(self._vllm_config.cache_config.prefix_caching_hash_algo)),
            compat.hash_tokens(self._vllm_config, self._kv_cache_config),
            layout_text,
            texts,
            compat.release(),
        )
        if rank == 0 and known_by_name_alone(self._config, self._vllm_config):
            self._logger.warning(
                "nothing tells which weights %s stands for: blocks that others compute under this"
                " name are found. Name the version with pegaflow.model, or serve a folder.",
                self._vllm_config.model_config.model,
            )
        client = connect(self._config, f"vllm worker {rank} {os.getpid()}", self._logger)
        worker = Worker(client, self._logger)
        try:
            worker.register(
                _instance(self._config, self._vllm_config),
                namespace,
                groups,
                rank,
                int(self._vllm_config.parallel_config.world_size),
                _mode(self._config),
            )
        except StatusError:
            client.close()
            raise
        on_gpu = any(one.memory is Memory.CUDA for group in groups for one in group.segments)
        self._device = "cuda" if on_gpu else "cpu"
        self._worker = worker
        self._lingers = not compat.in_lockstep(self._vllm_config)
        if int(self._vllm_config.parallel_config.world_size) == 1:
            self._handover = handover.offer(_instance(self._config, self._vllm_config))
        self._logger.info(
            "%d blocks of %s bytes in %s segments registered as rank %d, mode %s",
            blocks,
            "+".join(str(group.page_bytes) for group in groups),
            "+".join(str(len(group.segments)) for group in groups),
            rank,
            self._config.mode.value,
        )

    def suspend(self) -> None:
        """Sleep mode takes the KV cache's memory away. Raises TimeoutError while it is copied."""
        if self._worker is not None:
            self._worker.suspend()

    def resume(self) -> None:
        """The KV cache is back where it was."""
        if self._worker is not None:
            self._worker.resume()

    def namespace_for_scheduler(self) -> dict[str, str | int | None] | None:
        """What the scheduler has to register under, if it is to ask anything."""
        if not self._config.mode.loads or self._worker is None:
            return None
        namespace = self._worker.namespace
        return None if namespace is None else to_wire(namespace)

    def start_loads(self, step: StepMeta) -> None:
        """Begins the step's loads."""
        self._idle = step.idle
        if step.loads:
            self._ready().start_loads(step.loads, self._after())

    def start_saves(self, step: StepMeta) -> None:
        """Begins the step's saves, which are the step's no more: a second call begins nothing."""
        saves, step.saves = step.saves, []
        if saves:
            self._ready().start_saves(saves, self._after())

    def results(self) -> Results:
        """What ended since the last call: nothing, while vLLM has registered no KV cache. Which
        blocks failed can be asked for once more, by `failed_blocks`, which vLLM calls next.

        What a scheduler in this process takes itself is not in it."""
        if self._worker is None:
            return Results(set(), set(), set())
        if self._idle and self._lingers:
            self._worker.linger()
        results = self._worker.results()
        self._failed_blocks |= results.failed_blocks
        if self._hands_over is not None:
            # vLLM wants to hear of a failed load together with its blocks.
            self._hands_over.put(results.loaded - results.failed)
            results.loaded &= results.failed
        return results

    @property
    def _hands_over(self) -> handover.HandOver | None:
        found = self._handover
        return found if found is not None and found.accepted else None

    def failed_blocks(self) -> set[int]:
        """Blocks that failed loads left without bytes; none where `results` names the requests."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return set() if self.names_failed_requests else failed

    def report(self) -> WorkerReport | None:
        """What the scheduler has to know."""
        if self._worker is None:
            return None
        report = self._worker.report()
        over = self._hands_over
        if report is None and over is not None and (over.pending or self._worker.loading):
            # vLLM shows the scheduler only steps that have brought something.
            return WorkerReport()
        return report

    def counted(self) -> dict[str, int]:
        """What was counted since the last call."""
        if self._worker is None:
            return {}
        self._worker.count_transitions()
        return self._worker.counters.take()

    def shutdown(self) -> None:
        """Lets copies end and ends the session."""
        if self._worker is not None:
            self._worker.shutdown()

    def _ready(self) -> Worker:
        assert self._worker is not None, "vLLM has registered no KV cache"
        return self._worker

    def _after(self) -> Order | None:
        """What the stream has at this moment."""
        stream = compat.current_stream(self._device)
        return None if stream is None else Order.stream(stream)
