"""A worker's side: hands loads and saves to the daemon and tells what ended. It waits for nothing:
on a GPU both come after the work that the stream has, without the model's thread waiting for it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pegaflow.client import (
    AgainError,
    Client,
    Completion,
    Group,
    Mode,
    Namespace,
    Order,
    Registration,
    Status,
    StatusError,
    TimeoutError,
)
from pegaflow.connector.meta import GroupLoad, GroupSave, LoadJob, SaveJob, WorkerReport
from pegaflow.connector.namespace import to_wire
from pegaflow.connector.session import Watch
from pegaflow.connector.stats import Counters

#: How long a worker that ends, or goes to sleep, waits for copies under way.
SETTLE_S = 5.0

_ASLEEP = "the KV cache's memory is gone while the engine sleeps"

#: How long a worker with nothing to compute waits for a load that is about to end. Between such
#: steps vLLM sleeps for a millisecond, and what comes in meanwhile waits for both.
LINGER_MS = 3

#: Reasons that the client says itself: the daemon is away, or about to be.
_AWAY = (Status.DISCONNECTED, Status.NOT_READY, Status.DRAINING)


@dataclass
class _Loading:
    """A request's load under way."""

    parts_left: int
    failed: list[int] = field(default_factory=list)


@dataclass
class _Saving:
    """A step's save under way."""

    parts_left: int


@dataclass
class Results:
    """What ended since the last look."""

    #: Requests whose loads ended, well or not.
    loaded: set[str]
    #: Those among them whose load failed.
    failed: set[str]
    #: Blocks whose bytes are undefined.
    failed_blocks: set[int]


class Worker:
    """One rank. Not thread-safe: the model's thread calls it."""

    def __init__(self, client: Client, logger: logging.Logger) -> None:
        self._client = client
        self._logger = logger
        self.counters = Counters()
        self._watch = Watch(client)
        self._registration: Registration | None = None
        self._again: Callable[[], Registration] | None = None
        self._namespace: Namespace | None = None
        self._announced = False
        self._loads: dict[str, _Loading] = {}
        self._saves: dict[int, _Saving] = {}
        #: By request of the client: what it is part of.
        self._parts: dict[int, tuple[str, GroupLoad] | tuple[int, GroupSave]] = {}
        #: Not submitted yet for want of room.
        self._waiting: deque[
            tuple[str, GroupLoad, Order | None] | tuple[int, GroupSave, Order | None]
        ] = deque()
        self._ended_loads: set[str] = set()
        self._failed_loads: set[str] = set()
        self._unreported: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._ended_saves: dict[int, int] = {}
        self._incomplete: set[int] = set()
        self._said: set[tuple[str, Status]] = set()

    def register(
        self,
        instance: str,
        namespace: Namespace,
        groups: Sequence[Group],
        rank: int,
        world_size: int,
        mode: Mode,
    ) -> None:
        """Registers this rank's KV memory. Raises what `Client.register_worker` raises."""
        self._again = lambda: self._client.register_worker(
            instance, namespace, groups, rank=rank, world_size=world_size, mode=mode
        )
        self._registration = self._again()
        self._namespace = namespace

    def suspend(self) -> None:
        """The memory is about to go: ends copies under way and the registration. Nothing if that is
        done already. Raises TimeoutError if copies do not end."""
        if self._registration is None:
            return
        self._settle()
        self._registration.unregister()
        self._registration = None

    def resume(self) -> None:
        """The memory is back at the same addresses. Nothing if it never went."""
        if self._registration is None and self._again is not None:
            self._registration = self._again()

    @property
    def namespace(self) -> Namespace | None:
        """What was registered."""
        return self._namespace

    # ------------------------------------------------------------ steps

    def start_loads(self, loads: Sequence[LoadJob], after: Order | None) -> None:
        """Loads begin once the stream's present work has ended: it may still use the blocks."""
        for job in loads:
            self._loads[job.request_id] = _Loading(len(job.parts), list(job.refused))
            if not job.parts:
                self._end_load(job.request_id)
            for part in job.parts:
                self._submit(job.request_id, part, after)

    def start_saves(self, saves: Sequence[SaveJob], after: Order | None) -> None:
        """Saves begin once the stream's present work, which computes the blocks, has ended."""
        for job in saves:
            self._saves[job.job] = _Saving(len(job.parts))
            if not job.parts:
                self._end_save(job.job)
            for part in job.parts:
                self._submit_save(job.job, part, after)

    def results(self) -> Results:
        """What ended since the last call. Never blocks."""
        self._drain()
        results = Results(self._ended_loads, self._failed_loads, self._failed_blocks)
        self._ended_loads, self._failed_loads, self._failed_blocks = set(), set(), set()
        return results

    def linger(self) -> None:
        """Waits a little for the load that is under way longest, if there is one."""
        for request, (_, what) in self._parts.items():
            if isinstance(what, GroupLoad):
                with contextlib.suppress(TimeoutError):
                    self._ended(self._client.wait(request, LINGER_MS))
                return

    @property
    def loading(self) -> bool:
        """Loads are under way or wait to be."""
        return bool(self._loads)

    def report(self) -> WorkerReport | None:
        """What the scheduler has to know, or None if that is nothing."""
        incomplete = self._incomplete & self._ended_saves.keys()
        report = WorkerReport(self._ended_saves, incomplete, self._unreported)
        self._incomplete -= incomplete
        self._ended_saves, self._unreported = {}, set()
        if not self._announced and self._namespace is not None:
            self._announced = True
            report.namespaces.append(to_wire(self._namespace))
        return report if report else None

    def count_transitions(self) -> None:
        """Counts losses and returns of the daemon."""
        self._watch.count(self.counters)

    @property
    def busy(self) -> bool:
        """Copies are under way or wait to be."""
        return bool(self._parts or self._waiting)

    def shutdown(self) -> None:
        """Lets copies end, within a bound, before the memory goes."""
        self._settle()
        self._client.close()

    def _settle(self) -> None:
        end = time.monotonic() + SETTLE_S
        while self.busy and time.monotonic() < end:
            self._drain()
            time.sleep(0.001)
        if self.busy:
            self._logger.warning(
                "%d copies have not ended within %.0f s; going on", len(self._parts), SETTLE_S
            )

    # ------------------------------------------------------------ submitting

    def _submit(self, request_id: str, part: GroupLoad, after: Order | None) -> None:
        if self._waiting:
            self._waiting.append((request_id, part, after))
            return
        registration = self._registration
        if registration is None:
            self._load_failed(request_id, part.blocks, Status.NOT_READY, _ASLEEP)
            return
        try:
            request = registration.load(
                part.lease, part.blocks, first=part.first, group=part.group, after=after
            )
        except AgainError:
            self._waiting.append((request_id, part, after))
        except StatusError as error:
            self._load_failed(request_id, part.blocks, error.status, error.text)
        else:
            self._parts[request] = (request_id, part)

    def _submit_save(self, job: int, part: GroupSave, after: Order | None) -> None:
        if self._waiting:
            self._waiting.append((job, part, after))
            return
        registration = self._registration
        if registration is None:
            self._save_failed(job, len(part.blocks), Status.NOT_READY, _ASLEEP)
            return
        try:
            request = registration.save(part.hashes, part.blocks, group=part.group, after=after)
        except AgainError:
            self._waiting.append((job, part, after))
        except StatusError as error:
            self._save_failed(job, len(part.blocks), error.status, error.text)
        else:
            self._parts[request] = (job, part)

    # ------------------------------------------------------------ completions

    def _drain(self) -> None:
        if not self._parts and not self._waiting:
            return
        for completion in self._client.poll():
            self._ended(completion)
        waiting, self._waiting = self._waiting, deque()
        for owner, what, after in waiting:
            if isinstance(what, GroupLoad):
                assert isinstance(owner, str)
                self._submit(owner, what, after)
            else:
                assert isinstance(owner, int)
                self._submit_save(owner, what, after)

    def _ended(self, completion: Completion) -> None:
        part = self._parts.pop(completion.request, None)
        if part is None:
            return
        owner, what = part
        if isinstance(what, GroupLoad):
            assert isinstance(owner, str)
            self._loaded(owner, what, completion)
        else:
            assert isinstance(owner, int)
            self._saved(owner, what, completion)

    def _loaded(self, request_id: str, part: GroupLoad, completion: Completion) -> None:
        self.counters.add("loads")
        self.counters.add("loaded_bytes", completion.bytes)
        if not completion.ok:
            self._load_failed(request_id, part.blocks, completion.status, completion.text)
            return
        self.counters.add("loaded_blocks", completion.count)
        self._part_of_load_ended(request_id)

    def _load_failed(
        self, request_id: str, blocks: Sequence[int], status: Status, text: str
    ) -> None:
        """All blocks of the list are undefined: vLLM computes them."""
        self.counters.add("load_failures")
        self.counters.add("failed_load_blocks", len(blocks))
        self._say("a load", status, text)
        self._loads[request_id].failed.extend(blocks)
        self._part_of_load_ended(request_id)

    def _part_of_load_ended(self, request_id: str) -> None:
        load = self._loads[request_id]
        load.parts_left -= 1
        if load.parts_left == 0:
            self._end_load(request_id)

    def _end_load(self, request_id: str) -> None:
        load = self._loads.pop(request_id)
        self._ended_loads.add(request_id)
        if load.failed:
            self._failed_loads.add(request_id)
            self._unreported.add(request_id)
            self._failed_blocks.update(load.failed)

    def _saved(self, job: int, part: GroupSave, completion: Completion) -> None:
        self.counters.add("saves")
        self.counters.add("saved_blocks", completion.count)
        self.counters.add("saved_bytes", completion.bytes)
        self.counters.add("skipped_blocks", completion.skipped)
        if completion.ok or completion.status == Status.NO_SPACE:
            self.counters.add("dropped_blocks", completion.dropped)
            if completion.dropped:
                self._incomplete.add(job)
            self._part_of_save_ended(job)
        else:
            self._save_failed(
                job,
                len(part.blocks) - completion.count - completion.skipped,
                completion.status,
                completion.text,
            )

    def _save_failed(self, job: int, blocks: int, status: Status, text: str) -> None:
        self.counters.add("save_failures")
        self._incomplete.add(job)
        self.counters.add("dropped_blocks", blocks)
        self._say("a save", status, text)
        self._part_of_save_ended(job)

    def _part_of_save_ended(self, job: int) -> None:
        save = self._saves[job]
        save.parts_left -= 1
        if save.parts_left == 0:
            self._end_save(job)

    def _end_save(self, job: int) -> None:
        del self._saves[job]
        self._ended_saves[job] = self._ended_saves.get(job, 0) + 1

    def _say(self, what: str, status: Status, text: str) -> None:
        """Says once for each reason what fails; the counters have the rest."""
        if status in _AWAY or (what, status) in self._said:
            return
        self._said.add((what, status))
        self._logger.warning("%s failed, its blocks are computed or not cached: %s", what, text)
