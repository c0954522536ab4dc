"""Loads that ended reach a scheduler in the worker's process without a step in between."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pegaflow.connector import handover
from pegaflow.connector.engine import SchedulerEnd, WorkerEnd
from pegaflow.connector.meta import StepMeta, WorkerReport
from pegaflow.connector.scheduler import Step
from pegaflow.connector.worker import Results

from .engine_support import Engine, Request, tokens
from .support import Daemon, eventually

BLOCKS = [[1, 2, 3, 4]]


class StandIn:
    """A worker that says what it is told to say."""

    def __init__(self) -> None:
        self.next = Results(set(), set(), set())
        self.loading = False
        self.lingered = 0

    def linger(self) -> None:
        self.lingered += 1

    def results(self) -> Results:
        found, self.next = self.next, Results(set(), set(), set())
        return found

    def report(self) -> WorkerReport | None:
        return None


def ends(
    engine: str, *, accepted: bool = True, lingers: bool = True
) -> tuple[WorkerEnd, StandIn, SchedulerEnd]:
    """Both ends of an engine in one process."""
    worker = WorkerEnd.__new__(WorkerEnd)
    stand_in: Any = StandIn()
    worker._worker, worker._idle, worker._failed_blocks = stand_in, False, set()
    worker._lingers = lingers
    worker._handover = handover.offer(engine)
    scheduler = SchedulerEnd.__new__(SchedulerEnd)
    scheduler._handover = handover.accept(engine) if accepted else None
    return worker, stand_in, scheduler


@pytest.fixture
def engine(daemon: Daemon) -> Iterator[Engine]:
    one = Engine(daemon)
    yield one
    one.close()


def test_what_loaded_well_is_the_schedulers_at_once_and_vllms_never() -> None:
    worker, stand_in, scheduler = ends("both")
    assert worker.report() is None
    stand_in.loading = True
    # vLLM shows the scheduler no step that brought nothing, so this one brings something.
    assert worker.report() == WorkerReport()
    stand_in.next = Results({"good", "bad"}, {"bad"}, {7})
    stand_in.loading = False
    assert worker.results().loaded == {"bad"}
    assert worker.report() == WorkerReport()
    assert scheduler.loaded() == {"good"}
    assert scheduler.loaded() == set()
    assert worker.report() is None
    assert worker.results().loaded == set()


def test_without_a_scheduler_in_the_process_vllm_is_told() -> None:
    worker, stand_in, scheduler = ends("worker alone", accepted=False)
    stand_in.next = Results({"good", "bad"}, {"bad"}, {7})
    stand_in.loading = True
    assert worker.report() is None
    assert worker.results().loaded == {"good", "bad"}
    assert scheduler.loaded() == set()
    assert handover.accept("another engine") is None


def test_an_engine_that_is_gone_offers_nothing() -> None:
    worker, _, _ = ends("gone", accepted=False)
    assert handover.accept("gone") is worker._handover
    del worker
    gc.collect()
    assert handover.accept("gone") is None


@pytest.mark.parametrize("idle", [True, False])
def test_a_worker_lingers_in_idle_steps_alone(idle: bool) -> None:
    worker, stand_in, _ = ends("lingering")
    worker.start_loads(StepMeta(idle=idle))
    worker.results()
    assert stand_in.lingered == int(idle)


def test_a_worker_that_others_wait_for_in_every_step_does_not_linger() -> None:
    worker, stand_in, _ = ends("lockstep", lingers=False)
    worker.start_loads(StepMeta(idle=True))
    worker.results()
    assert not stand_in.lingered


def test_a_step_is_idle_while_nothing_runs(engine: Engine) -> None:
    request = Request(tokens(64))
    assert engine.scheduler.build(Step([], [], {})).idle
    meta = engine.run(request, BLOCKS)
    assert not meta.idle
    # Its step may still run, or its next token be about to come.
    assert not engine.scheduler.build(Step([], [], {})).idle
    engine.scheduler.finished(request)
    engine.drain()
    again = Request(request.tokens)
    found = engine.find(again)
    engine.scheduler.allocated(again, [[5, 6, 7, 8]], found)
    loading = engine.scheduler.build(Step([], [], {}))
    assert loading.idle
    assert [job.request_id for job in loading.loads] == [again.request_id]
    # Another one runs beside the load.
    other = Request(tokens(64, seed=1))
    assert not engine.run(other, [[9, 10, 11, 12]]).idle
    assert not engine.scheduler.build(Step([], [], {})).idle


def test_lingering_takes_the_end_of_a_load_and_leaves_saves_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(tokens(64))
    engine.save(request, BLOCKS)
    again = Request(request.tokens)
    found = engine.find(again)
    engine.scheduler.allocated(again, [[5, 6, 7, 8]], found)
    meta = engine.scheduler.build(Step([], [], {}))
    (worker,) = engine.workers
    saving = Request(tokens(64, seed=1))
    saves = engine.scheduler.build(
        Step([(saving.request_id, [[9, 10, 11, 12]], 0)], [], {saving.request_id: 64})
    )
    worker.start_saves(saves.saves, None)
    worker.start_loads(meta.loads, None)
    loads = [
        request
        for request, (_, part) in worker._parts.items()
        if part in [part for job in meta.loads for part in job.parts]
    ]
    waited = []
    wait = worker._client.wait

    def counted(request: int, timeout_ms: int) -> Any:
        waited.append(request)
        return wait(request, timeout_ms)

    monkeypatch.setattr(worker, "_client", SimpleNamespace(wait=counted, poll=list))

    def ended() -> bool:
        worker.linger()
        return not worker.loading

    eventually(ended, "the load ends without a look at other requests")
    assert set(waited) == set(loads)
    assert worker.results().loaded == {again.request_id}
    engine.verify(again, [[5, 6, 7]], found)
    # With no load left it does not wait at all.
    count = len(waited)
    worker.linger()
    assert len(waited) == count
