"""The scheduler's side: what is loaded, what is saved, and when a block may be used again.

One decision for all ranks is taken here. vLLM's objects are only read, by the attributes named in
`RequestView`; what differs between releases of vLLM is in `compat`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pegaflow.connector.blocks import Holder
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.events import Stored, stored
from pegaflow.connector.groups import CacheGroup
from pegaflow.connector.lookup import Lookup, Prompt, loads_of
from pegaflow.connector.meta import GroupSave, LoadJob, SaveJob, StepMeta, WorkerReport
from pegaflow.connector.names import Adapters, combined, packed
from pegaflow.connector.stats import Counters

#: Saves that have not ended for so long do not keep an idle engine stepping.
STUCK_S = 5.0
#: vLLM's block that stands for "none".
NULL_BLOCK = 0


class RequestView(Protocol):
    """What is read of a request of vLLM."""

    @property
    def request_id(self) -> str: ...
    @property
    def block_hashes(self) -> Sequence[bytes]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...


@dataclass
class Step:
    """What a step of vLLM schedules."""

    #: Request, its blocks by group, its computed tokens: new ones and ones that begin anew.
    fresh: Sequence[tuple[str, Sequence[Sequence[int]], int]]
    #: Request and its further blocks by group.
    grown: Sequence[tuple[str, Sequence[Sequence[int]]]]
    #: Request and how many tokens the step computes for it.
    scheduled: Mapping[str, int]


@dataclass
class Tracked:
    """A request from its first question to its end."""

    request: RequestView
    prompt: Prompt
    #: Tokens that vLLM itself had when it asked last.
    local: int = 0
    #: By group; empty until it is scheduled, and while it is preempted.
    blocks: list[list[int]] = field(default_factory=list)
    #: By group: blocks before this one are saved, or on their way.
    saved: list[int] = field(default_factory=list)
    #: No block is complete before so many tokens are computed.
    next_at: int = 0
    #: Its blocks are being loaded.
    loading: bool = False
    #: A load of it failed: another one might fail again, and again.
    failed: bool = False


@dataclass
class Saving:
    """A save under way."""

    blocks: list[int]
    ranks_left: int
    #: What is told once all ranks have stored all of it.
    events: list[Stored]


class Scheduler:
    """One engine's decisions. Not thread-safe."""

    def __init__(
        self,
        config: ConnectorConfig,
        groups: Sequence[CacheGroup],
        world_size: int,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        *,
        with_events: bool = False,
        adapters: Adapters | None = None,
    ) -> None:
        self._config = config
        self._with_events = with_events
        self._groups = list(groups)
        self._world_size = world_size
        self._logger = logger
        self._clock = clock
        self.counters = Counters()
        self._lookup: Lookup | None = None
        self._holder: Holder | None = None
        self._requests: dict[str, Tracked] = {}
        self._next_key = 1
        self._next_job = 1
        self._loads: list[LoadJob] = []
        #: Complete blocks of requests that ended, held already.
        self._late: list[tuple[CacheGroup, bytes, list[int]]] = []
        #: What those blocks, once saved, are told as.
        self._late_events: list[Stored] = []
        #: The same of recurrent state, which may still be moved after the step that computes it
        #: (once vLLM knows which drafts it takes): for the step after.
        self._states: list[tuple[CacheGroup, bytes, list[int]]] = []
        self._states_events: list[Stored] = []
        self._events: list[Stored] = []
        self._saving: dict[int, Saving] = {}
        self._saving_blocks = 0
        self._progress = clock()
        self._adapters = adapters or Adapters()
        self._mask: bytes | None = None

    # ------------------------------------------------------------ wiring

    def attach(self, lookup: Lookup) -> None:
        """From now on the daemon can be asked."""
        self._lookup = lookup

    @property
    def attached(self) -> bool:
        """The daemon can be asked."""
        return self._lookup is not None

    def bind(self, holder: Holder) -> None:
        """How blocks are held. Without it nothing is saved."""
        self._holder = holder

    # ------------------------------------------------------------ loads

    def matched(self, request: RequestView, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` can be loaded, and whether between steps.

        The last token is always left to compute: its logits are what the prompt is for.
        """
        lookup = self._lookup
        if lookup is None or not self._config.mode.loads:
            return 0, False
        tracked = self._track(request)
        tracked.local = computed
        if tracked.failed:
            return 0, False
        ratio = min(group.block_tokens // group.hashes_per_block for group in self._groups)
        # A block that is only looked at may have the last token.
        most = min(request.num_tokens - 1 + lookup.beyond, len(request.block_hashes) * ratio)
        tokens = lookup.find(tracked.prompt, request.block_hashes, computed, most)
        return tokens, bool(tokens)

    def allocated(
        self, request: RequestView, blocks: Sequence[Sequence[int]], external: int
    ) -> None:
        """vLLM has given a request its blocks; the first `external` tokens beyond what it has are
        to be loaded into them."""
        tracked = self._track(request)
        # Those of before a preemption are others' by now; these are its own once it is scheduled.
        tracked.blocks = []
        lookup = self._lookup
        if lookup is None:
            return
        if external <= 0:
            lookup.forget(tracked.prompt)
            tracked.loading = False
            return
        answer = lookup.take(tracked.prompt, external)
        if answer is None:
            raise RuntimeError(
                f"request {request.request_id}: vLLM wants {external} tokens loaded that the"
                " connector has not offered"
            )
        refused: list[int] = []
        try:
            parts = loads_of(answer, blocks, external)
        except ValueError as error:
            self._logger.error("request %s is computed, not loaded: %s", request.request_id, error)
            parts = []
            refused = [block for own in blocks for block in own if block != NULL_BLOCK]
        loaded = {part.lease for part in parts}
        for held in answer.held:
            if held.lease not in loaded:
                lookup.release(held.lease)
        self._loads.append(LoadJob(request.request_id, parts, refused))
        tracked.loading = True

    # ------------------------------------------------------------ steps

    def build(self, step: Step) -> StepMeta:
        """What the workers do in this step."""
        if self._lookup is not None:
            self._lookup.poll()
        loads, self._loads = self._loads, []
        for request_id, blocks, computed in step.fresh:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                self._begin(tracked, blocks, computed)
        for request_id, more in step.grown:
            tracked = self._requests.get(request_id)
            if tracked is not None and tracked.blocks:
                for own, new in zip(tracked.blocks, more, strict=True):
                    own.extend(new)
        # Of a request that runs, a step before this one may not have ended.
        idle = not step.scheduled and not any(one.blocks for one in self._requests.values())
        return StepMeta(loads, self._saves(step.scheduled), idle)

    def _begin(self, tracked: Tracked, blocks: Sequence[Sequence[int]], computed: int) -> None:
        """The request runs with these blocks; all before `computed` tokens is there."""
        tracked.loading = False
        tracked.blocks = [list(own) for own in blocks]
        tracked.saved = [computed // group.block_tokens for group in self._groups]
        tracked.next_at = 0
        local = min(tracked.local, computed)
        if local and self._config.mode.saves and self._lookup is not None:
            self._save_local(tracked, local)

    def _save_local(self, tracked: Tracked, local: int) -> None:
        """Blocks that vLLM has in its own cache, but the daemon has not: it was away, or evicted
        them. Costs a look at shared memory."""
        lookup = self._lookup
        assert lookup is not None
        if lookup.away:
            return
        hashes = tracked.request.block_hashes
        for group, own in zip(self._groups, tracked.blocks, strict=True):
            last = local // group.block_tokens
            first = group.needed_from(last)
            names = group.names(hashes, first, last)
            cached = lookup.registration_of().probe_membership(
                packed(names, tracked.prompt.mask), group=group.number
            )
            missing = (~cached.to_int()) & ((1 << len(names)) - 1)
            if missing:
                # As a text: to shift so long a number for each of its bits takes ten times as long.
                chosen = [at for at, bit in enumerate(f"{missing:b}"[::-1]) if bit == "1"]
                lacking = [names[at] for at in chosen]
                if group.recurrent:
                    self._offer(tracked, group, *self._states_of(group, lacking))
                else:
                    self._offer(tracked, group, lacking, [own[first + at] for at in chosen])

    def _saves(self, scheduled: Mapping[str, int]) -> list[SaveJob]:
        if self._config.mode.saves:
            for request_id, tokens in scheduled.items():
                tracked = self._requests.get(request_id)
                if tracked is None or not tracked.blocks:
                    continue
                computed = tracked.request.num_computed_tokens + tokens
                if computed >= tracked.next_at:
                    self._complete(tracked, min(computed, tracked.request.num_tokens))
        late, self._late, self._states = self._late, self._states, []
        events, self._late_events, self._states_events = (
            self._late_events,
            self._states_events,
            [],
        )
        if not late:
            return []
        job = self._next_job
        self._next_job += 1
        parts = []
        for group in self._groups:
            names = b"".join(own for one, own, _ in late if one is group)
            blocks = [block for one, _, own in late if one is group for block in own]
            if blocks:
                parts.append(GroupSave(group.number, names, blocks))
        if not self._saving:
            self._progress = self._clock()
        held = [block for _, _, own in late for block in own]
        self._saving[job] = Saving(held, self._world_size, events)
        return [SaveJob(job, parts)]

    def _complete(self, tracked: Tracked, known: int) -> None:
        """Offers the blocks that are complete once `known` tokens, whose values are known, are
        computed."""
        request = tracked.request
        tracked.next_at = 1 << 62
        for at, group in enumerate(self._groups):
            first = tracked.saved[at]
            hashed = len(request.block_hashes) // group.hashes_per_block
            last = min(known // group.block_tokens, hashed)
            if last > first and group.recurrent:
                tracked.saved[at] = self._complete_states(tracked, group, first, last)
            elif last > first:
                whole = self._offer(
                    tracked,
                    group,
                    group.names(request.block_hashes, first, last),
                    tracked.blocks[at][first:last],
                )
                tracked.saved[at] = last
                if whole and self._with_events:
                    self._late_events.append(stored(request, group, first, last))
            tracked.next_at = min(tracked.next_at, (max(first, last) + 1) * group.block_tokens)

    def _complete_states(self, tracked: Tracked, group: CacheGroup, first: int, last: int) -> int:
        """Offers the states that vLLM keeps of blocks `first` to `last - 1`. A request's table does
        not tell which they are: vLLM moves them, and writes the next state where the last one was.
        Returns the first block to look at the next time."""
        hashes = tracked.request.block_hashes
        names = group.names(hashes, first, last)
        kept, blocks = self._states_of(group, names)
        whole = self._offer(tracked, group, kept, blocks)
        if whole and self._with_events:
            self._states_events += [
                stored(tracked.request, group, at, at + 1)
                for at, name in enumerate(names, first)
                if name in kept
            ]
        # vLLM may name the last one a step later than it is complete.
        return last if kept and kept[-1] == names[-1] else last - 1

    def _states_of(
        self, group: CacheGroup, names: Sequence[bytes]
    ) -> tuple[list[bytes], list[int]]:
        """Those of the names that vLLM has a state of, and its blocks."""
        if self._holder is None:
            return [], []
        found = [(name, self._holder.cached(name, group.index)) for name in names]
        kept = [(name, block) for name, block in found if block is not None]
        return [name for name, _ in kept], [block for _, block in kept]

    def _offer(
        self, tracked: Tracked, group: CacheGroup, names: Sequence[bytes], blocks: list[int]
    ) -> bool:
        """Holds blocks for a save in this step or the next one (state: the next one or the one
        after). Tells whether it takes them all."""
        holder = self._holder
        if holder is None:
            return False
        wanted = len(blocks)
        if NULL_BLOCK in blocks:
            kept = [at for at, block in enumerate(blocks) if block != NULL_BLOCK]
            names, blocks = [names[at] for at in kept], [blocks[at] for at in kept]
        room = holder.total * self._config.max_saving_percent // 100 - self._saving_blocks
        if len(blocks) > room:
            self.counters.add("unsaved_blocks", len(blocks) - max(room, 0))
            names, blocks = names[: max(room, 0)], blocks[: max(room, 0)]
        if blocks:
            holder.hold(blocks)
            self._saving_blocks += len(blocks)
            offered = self._states if group.recurrent else self._late
            offered.append((group, packed(names, tracked.prompt.mask), blocks))
        return len(blocks) == wanted

    # ------------------------------------------------------------ ends

    def finished(self, request: RequestView) -> None:
        """The request ended, was aborted, or failed; its blocks are about to be freed. Saves under
        way hold their own."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return
        if self._lookup is not None:
            self._lookup.forget(tracked.prompt)
        if tracked.blocks and not tracked.loading and self._config.mode.saves:
            # The last token was sampled, not computed.
            self._complete(tracked, min(request.num_computed_tokens, request.num_tokens - 1))

    def report(self, report: WorkerReport) -> None:
        """What the workers are through with."""
        for request_id in report.failed_loads:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                tracked.failed = True
        for job, ranks in report.saved.items():
            saving = self._saving.get(job)
            if saving is None:
                self._logger.error("save %d ended more often than there are ranks", job)
                continue
            saving.ranks_left -= ranks
            if job in report.incomplete:
                saving.events = []
            self._progress = self._clock()
            if saving.ranks_left <= 0:
                del self._saving[job]
                self._events += saving.events
                self._saving_blocks -= len(saving.blocks)
                assert self._holder is not None
                self._holder.drop(saving.blocks)

    def events(self) -> list[Stored]:
        """What was stored since the last call, if that is to be told."""
        events, self._events = self._events, []
        return events

    @property
    def saves_pending(self) -> bool:
        """Saves are under way or wait for a step, and there is hope that they end soon."""
        if self._late or self._states:
            return True
        return bool(self._saving) and self._clock() - self._progress < STUCK_S

    @property
    def frees_pending(self) -> bool:
        """Blocks come free when saves under way end."""
        return bool(self._saving) and self._clock() - self._progress < STUCK_S

    def reset(self) -> None:
        """Nothing that was saved so far is found again by this engine: its weights may be others.

        From now on its blocks have names of their own, which no other engine shares.
        """
        self._mask = secrets.token_bytes(32)
        for tracked in self._requests.values():
            # What is computed already is not saved under the new names.
            tracked.blocks = []
            tracked.prompt.mask = combined(self._mask, self._adapters.mask(tracked.request))
            if self._lookup is not None:
                self._lookup.forget(tracked.prompt)
        late = self._late + self._states
        self._late, self._states = [], []
        self._late_events, self._states_events = [], []
        for _, _, blocks in late:
            self._saving_blocks -= len(blocks)
            assert self._holder is not None
            self._holder.drop(blocks)

    def _track(self, request: RequestView) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.request is not request:
            if tracked is not None and self._lookup is not None:
                self._lookup.forget(tracked.prompt)
            mask = combined(self._mask, self._adapters.mask(request))
            tracked = Tracked(request, Prompt(self._next_key, mask))
            self._next_key += 1
            self._requests[request.request_id] = tracked
        return tracked
