"""The thin layer over vLLM's interface, on stand-ins for vLLM's modules."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pegaflow.client import Status, StatusError
from pegaflow.connector import compat
from pegaflow.connector.config import ConnectorConfig, ConnectorMode
from pegaflow.connector.engine import SchedulerEnd, WorkerEnd
from pegaflow.connector.groups import CacheGroup
from pegaflow.connector.layout import LayoutError
from pegaflow.connector.meta import GroupSave, SaveJob, StepMeta, WorkerReport
from pegaflow.connector.scheduler import Scheduler

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"
FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"
OURS = ("pegaflow.connector.connector", "pegaflow.connector.prometheus")


class Base:
    """What vLLM's base class does with the metadata of a step."""

    _connector_metadata: Any = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._connector_metadata = metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def has_connector_metadata(self) -> bool:
        return self._connector_metadata is not None

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata


class Factory:
    """vLLM's table of connectors."""

    known: dict[str, tuple[str, str]]

    @classmethod
    def register_connector(cls, name: str, module: str, kind: str) -> None:
        if name in cls.known:
            raise ValueError(f"Connector '{name}' is already registered.")
        cls.known[name] = (module, kind)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module `connector` over stand-ins for what it imports."""
    Factory.known = {}
    kinds: dict[str, dict[str, Any]] = {
        BASE: {
            "KVConnectorBase_V1": Base,
            "KVConnectorHandshakeMetadata": object,
            "KVConnectorMetadata": object,
            "KVConnectorRole": object,
            "KVConnectorWorkerMetadata": object,
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        METRICS: {"KVConnectorPromMetrics": object, "KVConnectorStats": object},
        FACTORY: {"KVConnectorFactory": Factory},
        "prometheus_client": {"Counter": object},
    }
    for name, values in kinds.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType("package"))
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(OURS[0])
    for name in OURS:
        sys.modules.pop(name, None)


def on_a_worker(adapter: Any) -> tuple[Any, list[int]]:
    """A connector of a worker, and the jobs whose saves it has begun."""
    begun: list[int] = []

    def start_saves(saves: list[SaveJob], after: object) -> None:
        assert after is None
        begun.extend(job.job for job in saves)

    worker = SimpleNamespace(start_saves=start_saves)
    end = WorkerEnd.__new__(WorkerEnd)
    end._worker, end._device = worker, "cpu"  # type: ignore[assignment]
    connector = adapter.PegaKVConnector.__new__(adapter.PegaKVConnector)
    connector._scheduler, connector._worker = None, end
    return connector, begun


def step(job: int) -> StepMeta:
    return StepMeta(saves=[SaveJob(job, [GroupSave(0, bytes(32), [1])])])


def test_saves_of_a_step_without_tokens_begin_where_vllm_does_not_ask_for_them(
    adapter: Any,
) -> None:
    connector, begun = on_a_worker(adapter)
    connector.bind_connector_metadata(adapter.PegaMetadata(step(1)))
    connector.start_load_kv(None)
    connector.clear_connector_metadata()
    assert begun == [1]
    assert not connector.has_connector_metadata()
    # Nothing is bound now: nothing to begin.
    connector.clear_connector_metadata()
    assert begun == [1]


def test_saves_that_vllm_has_asked_for_begin_once(adapter: Any) -> None:
    connector, begun = on_a_worker(adapter)
    for job in (1, 2):
        connector.bind_connector_metadata(adapter.PegaMetadata(step(job)))
        connector.start_load_kv(None)
        connector.wait_for_save()
        connector.clear_connector_metadata()
    assert begun == [1, 2]


def test_a_multiconnector_finds_the_connector_by_its_name(adapter: Any) -> None:
    assert Factory.known == {"PegaKVConnector": ("pegaflow.connector", "PegaKVConnector")}
    # Made known by somebody else before: that stays.
    adapter.compat.make_known("PegaKVConnector", "another")
    assert Factory.known == {"PegaKVConnector": ("pegaflow.connector", "PegaKVConnector")}


def test_what_another_connector_of_a_multiconnector_shakes_hands_with_is_left_alone(
    adapter: Any,
) -> None:
    connector = adapter.PegaKVConnector.__new__(adapter.PegaKVConnector)
    heard: list[list[object]] = []
    connector._scheduler = SimpleNamespace(handshake=heard.append)
    connector.set_xfer_handshake_metadata({0: object()})
    connector.set_xfer_handshake_metadata_pp_aware({(0, 0): object()})
    connector.set_xfer_handshake_metadata_pp_aware({(0, 0): adapter.PegaHandshake({"model": "m"})})
    assert heard == [[], [], [{"model": "m"}]]


@pytest.mark.parametrize(
    ("groups", "by_request"),
    [
        ([CacheGroup(0, 0, 16, 1)], False),
        ([CacheGroup(0, 0, 16, 1, sliding=True)], True),
        ([CacheGroup(0, 0, 16, 1), CacheGroup(1, 1, 16, 1, 4, sliding=True)], True),
    ],
)
def test_failed_loads_are_told_by_request_where_blocks_do_not_say_enough(
    monkeypatch: pytest.MonkeyPatch, groups: list[CacheGroup], by_request: bool
) -> None:
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(), cache_config=SimpleNamespace())
    monkeypatch.setattr(compat, "cache_groups", lambda *_: groups)
    monkeypatch.setattr(compat, "HAS_TRANSFER_RESULTS", True)
    end = WorkerEnd(ConnectorConfig(), vllm_config, None)
    end._failed_blocks = {3, 4}
    assert end.names_failed_requests == by_request
    assert end.failed_blocks() == (set() if by_request else {3, 4})
    assert not end.failed_blocks()
    # A vLLM that cannot be told is refused at start, unless nothing is loaded.
    monkeypatch.setattr(compat, "HAS_TRANSFER_RESULTS", False)
    WorkerEnd(ConnectorConfig(mode=ConnectorMode.SAVE_ONLY), vllm_config, None)
    if by_request:
        with pytest.raises(LayoutError, match="cannot be told"):
            WorkerEnd(ConnectorConfig(), vllm_config, None)


def test_a_scheduler_that_cannot_register_between_steps_lets_the_engine_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(_end: SchedulerEnd, _namespaces: object) -> None:
        raise StatusError(Status.TIMEOUT, "no answer")

    monkeypatch.setattr(SchedulerEnd, "handshake", refused)
    end = SchedulerEnd.__new__(SchedulerEnd)
    end._logger = logging.getLogger("pegaflow.test")
    end._scheduler = Scheduler(ConnectorConfig(), [CacheGroup(0, 0, 16, 1)], 1, end._logger)
    end.report(WorkerReport(namespaces=[{}]))
    assert end._scheduler.matched(object(), 0) == (0, False)  # type: ignore[arg-type]
