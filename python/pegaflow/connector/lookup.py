"""Asks the daemon what of a prompt is cached, once per prompt, and holds the answer's lease."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pegaflow.client import (
    AgainError,
    Client,
    Completion,
    Fetch,
    Registration,
    State,
    Status,
    StatusError,
    TimeoutError,
)
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.groups import CacheGroup
from pegaflow.connector.meta import GroupLoad
from pegaflow.connector.names import packed
from pegaflow.connector.stats import Counters

#: How long the scheduler waits for an answer before it goes on with other requests.
WAIT_MS = 5
#: How long it waits in one step for all of them, so that no number of requests whose questions a
#: daemon leaves open holds up those that are running.
STEP_WAIT_MS = 10
#: How long a miss is believed. Asking again costs a round trip.
MISS_S = 0.2
#: A name that no block has.
NO_BLOCK = bytes(32)
#: How soon blocks that are coming up from a slower tier are asked for again.
LOADING_S = 0.002


@dataclass
class Held:
    """A lease on blocks of one group: `first` is its first position that is used."""

    group: CacheGroup
    lease: int
    first: int
    #: Blocks `begin` to `end - 1` of the request.
    begin: int
    end: int


@dataclass
class Answer:
    """What is cached of a prompt beyond `computed` tokens."""

    computed: int
    limit: int
    tokens: int
    held: list[Held]
    #: Until then it holds without asking again.
    until: float
    #: Less of it is no answer: a group has only what a hit of this length needs.
    exact: bool = False


@dataclass
class Asked:
    """A question under way."""

    computed: int
    limit: int
    #: By the group's number: the request, then its completion.
    requests: dict[int, int]
    since: float
    #: Blocks are coming up since then.
    loading_since: float | None = None
    #: Not before.
    again_at: float = 0.0
    #: They took too long: what is in the pool now has to do.
    settle: bool = False
    #: Leases that groups had by the question before.
    earlier: list[int] = field(default_factory=list)
    answers: dict[int, Completion] = field(default_factory=dict)


@dataclass
class Prompt:
    """What the lookup keeps for a request."""

    key: int
    #: Its names are those of vLLM changed by this.
    mask: bytes | None = None
    asked: Asked | None = None
    answer: Answer | None = None


class Lookup:
    """The scheduler's queries. Not thread-safe: vLLM's scheduler is one thread."""

    def __init__(
        self,
        client: Client,
        registration: Registration,
        groups: Sequence[CacheGroup],
        config: ConnectorConfig,
        counters: Counters,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        *,
        drops_last_block: bool = False,
    ) -> None:
        self._client = client
        self._registration = registration
        self._groups = sorted(groups, key=lambda group: group.number)
        self._config = config
        self._counters = counters
        self._logger = logger
        self._clock = clock
        #: A hit ends where a block of every group ends.
        self.align = math.lcm(*(group.block_tokens for group in groups))
        #: So many tokens after a hit have to be cached, too, as with vLLM's own hits.
        self.beyond = self.align if drops_last_block else 0
        #: Completions that polling found, of requests somebody asks for.
        self._arrived: dict[int, Completion] = {}
        self._awaited: set[int] = set()
        #: Requests under way whose answers only `poll` takes.
        self._loose = 0
        #: Questions among them that were given up: under which key, about which group.
        self._given_up: dict[int, tuple[int, int]] = {}
        #: What a prompt is called once a question under its old key was given up.
        self._new_keys = itertools.count(1 << 32)
        self._waited_ms = 0.0
        self._refusals: set[Status] = set()

    def registration_of(self) -> Registration:
        """The scheduler's registration, for probes."""
        return self._registration

    @property
    def away(self) -> bool:
        """There is no daemon at the moment."""
        return self._client.state != State.CONNECTED

    def find(self, prompt: Prompt, hashes: Sequence[bytes], computed: int, most: int) -> int | None:
        """How many tokens after `computed` are cached, `beyond` of them left out; no block that is
        looked at reaches beyond `most` tokens. None: not known yet, ask again.

        The same question gets the same answer and holds the same lease.
        """
        limit = most // self.align * self.align
        now = self._clock()
        answer = prompt.answer
        if answer is not None and answer.computed == computed and answer.limit == limit:
            if now < answer.until:
                return answer.tokens
        elif answer is not None:
            self.forget(prompt)
        asked = prompt.asked
        if asked is not None and (asked.computed, asked.limit) != (computed, limit):
            self._abandon(prompt)
            asked = None
        if limit - self.beyond <= computed or computed % self.align:
            return 0
        if asked is None:
            asked = prompt.asked = Asked(computed, limit, {}, now)
        if now < asked.again_at:
            return None
        return self._ask(prompt, asked, hashes, now)

    def take(self, prompt: Prompt, tokens: int) -> Answer | None:
        """The answer that is to be loaded: its leases belong to the load now. None if there is no
        answer of so many tokens."""
        answer = prompt.answer
        if answer is None or answer.tokens < tokens:
            return None
        prompt.answer = None
        return answer

    def forget(self, prompt: Prompt) -> None:
        """The request is over, or loads nothing: gives its leases back."""
        self._abandon(prompt)
        self._give_back(prompt)

    def _give_back(self, prompt: Prompt) -> None:
        answer, prompt.answer = prompt.answer, None
        if answer is not None:
            for held in answer.held:
                self.release(held.lease)

    def release(self, lease: int) -> None:
        """Gives a lease back. One that cannot be given back now ends by its time to live."""
        try:
            self._registration.release(lease)
            self._loose += 1
        except StatusError as error:
            self._logger.debug("lease %d is left to expire: %s", lease, error)

    def poll(self) -> None:
        """Takes answers that nobody waits for: once per step."""
        self._waited_ms = 0.0
        self._take()

    def _take(self) -> None:
        if not self._loose and not self._awaited:
            return
        for completion in self._client.poll():
            if completion.request in self._awaited:
                self._arrived[completion.request] = completion
                continue
            self._loose -= 1
            given_up = self._given_up.pop(completion.request, None)
            if given_up is not None and _is_loading(completion):
                self._end_fetching(*given_up)
            if completion.lease and completion.ok and completion.op.name == "QUERY":
                # Of a question that was given up.
                self.release(completion.lease)

    # ------------------------------------------------------------ asking

    def _ask(self, prompt: Prompt, asked: Asked, hashes: Sequence[bytes], now: float) -> int | None:
        try:
            for group in self._groups:
                if group.number not in asked.requests and group.number not in asked.answers:
                    asked.requests[group.number] = self._submit(prompt, group, asked, hashes)
        except AgainError:
            self._take()
            return self._later(prompt, asked, now)
        except StatusError as error:
            self._refused(error.status, str(error))
            self._abandon(prompt)
            return self._miss(prompt, asked, now)
        for number, request in list(asked.requests.items()):
            completion = self._completion(request)
            if completion is None:
                return self._later(prompt, asked, now)
            del asked.requests[number]
            self._awaited.discard(request)
            asked.answers[number] = completion
        return self._conclude(prompt, asked, now)

    def _submit(
        self, prompt: Prompt, group: CacheGroup, asked: Asked, hashes: Sequence[bytes]
    ) -> int:
        names = group.names(
            hashes, asked.computed // group.block_tokens, asked.limit // group.block_tokens
        )
        request = self._registration.query(
            prompt.key,
            packed(names, prompt.mask),
            group=group.number,
            ttl_ms=self._config.lease_ttl_ms,
            fetch=Fetch.NEVER if asked.settle else Fetch.POLL,
        )
        self._awaited.add(request)
        return request

    def _completion(self, request: int) -> Completion | None:
        arrived = self._arrived.pop(request, None)
        if arrived is not None:
            return arrived
        began = self._clock()
        left = max(0, int(STEP_WAIT_MS - self._waited_ms))
        try:
            return self._client.wait(request, min(WAIT_MS, left))
        except TimeoutError:
            return None
        finally:
            self._waited_ms += (self._clock() - began) * 1000

    def _later(self, prompt: Prompt, asked: Asked, now: float) -> int | None:
        if now - asked.since < self._config.query_timeout_ms / 1000:
            return None
        self._counters.add("query_timeouts")
        self._abandon(prompt)
        return self._miss(prompt, asked, now)

    def _abandon(self, prompt: Prompt) -> None:
        """Gives a question up; `poll` gives back what is answered later."""
        asked, prompt.asked = prompt.asked, None
        if asked is None:
            return
        key = prompt.key
        if asked.requests or asked.loading_since is not None:
            # The same key and hashes would get the lease of the late answer, which is given back.
            prompt.key = next(self._new_keys)
        # Those for whose blocks the daemon waits.
        loading = {
            group.number
            for group in self._groups
            if asked.loading_since is not None or _is_loading(asked.answers.get(group.number))
        }
        for number, request in asked.requests.items():
            self._awaited.discard(request)
            arrived = self._arrived.pop(request, None)
            if arrived is None:
                self._loose += 1
                self._given_up[request] = key, number
            elif _is_loading(arrived):
                loading.add(number)
            elif arrived.lease:
                self.release(arrived.lease)
        for number in loading:
            self._end_fetching(key, number)
        leases = {completion.lease for completion in asked.answers.values()}
        for lease in leases.union(asked.earlier) - {0}:
            self.release(lease)

    def _end_fetching(self, key: int, group: int) -> None:
        """Nobody waits for blocks from a slower tier any more: by another question under its key
        the daemon learns that it need not bring the rest, nor keep for long what is in."""
        try:
            self._registration.query(key, NO_BLOCK, group=group, fetch=Fetch.NEVER)
            self._loose += 1
        except StatusError as error:
            self._logger.debug("blocks of a request that is over come up: %s", error)

    # ------------------------------------------------------------ answers

    def _conclude(self, prompt: Prompt, asked: Asked, now: float) -> int | None:
        statuses = {completion.status for completion in asked.answers.values()}
        if Status.LOADING in statuses:
            since = asked.loading_since if asked.loading_since is not None else now
            late = now - since >= self._config.loading_timeout_ms / 1000
            if not asked.settle:
                # Answers of other groups are leases that the repeated question gets again.
                prompt.asked = Asked(
                    asked.computed,
                    asked.limit,
                    {},
                    now,
                    since,
                    again_at=now if late else now + LOADING_S,
                    settle=late,
                    earlier=[one.lease for one in asked.answers.values() if one.lease],
                )
                return None
        if statuses != {Status.OK}:
            for completion in asked.answers.values():
                if completion.status not in (Status.OK, Status.LOADING):
                    self._refused(completion.status, completion.text)
            self._abandon(prompt)
            return self._miss(prompt, asked, now)
        self._refusals.clear()
        held, end = self._combined(asked)
        prompt.asked = None
        for completion in asked.answers.values():
            if completion.lease and completion.lease not in [one.lease for one in held]:
                self.release(completion.lease)
        if not held:
            return self._miss(prompt, asked, now)
        self._counters.add("queries")
        self._counters.add("hit_blocks", sum(one.end - one.begin for one in held))
        ttl_ms = min(asked.answers[one.group.number].value for one in held)
        exact = not all(group.whole for group in self._groups)
        until = now + ttl_ms / 2000
        tokens = end - asked.computed
        prompt.answer = Answer(asked.computed, asked.limit, tokens, held, until, exact)
        return tokens

    def _combined(self, asked: Asked) -> tuple[list[Held], int]:
        """The longest hit that every group can serve, and what each has to load for it."""
        end = asked.limit
        # Only group 0 is answered by a count; a model without any group of a prefix has none.
        prefix = self._groups[0] if self._groups[0].number == 0 else None
        if prefix is not None:
            first = asked.computed // prefix.block_tokens
            end = (first + asked.answers[0].count) * prefix.block_tokens // self.align * self.align
        if end > asked.computed:
            end -= self.beyond
        # Bit n is set if a hit may end n times `align` after what vLLM has.
        possible = (2 << (end - asked.computed) // self.align) - 1
        others = [group for group in self._groups if group is not prefix]
        for group in others:
            ends = ends_of(group, asked)[:: self.align // group.block_tokens]
            possible &= int(ends[::-1], 2)
        end = asked.computed + (possible.bit_length() - 1) * self.align
        if end <= asked.computed:
            return [], asked.computed
        held = [part for group in others if (part := _tail(group, asked, end)).end > part.begin]
        if prefix is not None:
            lease = asked.answers[0].lease
            held.insert(0, Held(prefix, lease, 0, first, end // prefix.block_tokens))
        return held, end

    def _miss(self, prompt: Prompt, asked: Asked, now: float) -> int:
        self._counters.add("queries")
        self._counters.add("query_misses")
        prompt.asked = None
        # One that was to be asked for anew.
        self._give_back(prompt)
        prompt.answer = Answer(asked.computed, asked.limit, 0, [], now + MISS_S)
        return 0

    def _refused(self, status: Status, text: str) -> None:
        """Says once what keeps queries from being answered. That the daemon is away is said by the
        client."""
        if status in (Status.DISCONNECTED, Status.NOT_READY, Status.DRAINING):
            return
        if status not in self._refusals:
            self._refusals.add(status)
            self._logger.warning("the daemon answers no query: %s", text)


def _is_loading(completion: Completion | None) -> bool:
    return completion is not None and completion.status == Status.LOADING


def _bits(group: CacheGroup, asked: Asked) -> int:
    bitmap = asked.answers[group.number].bitmap
    return bitmap.to_int() if bitmap is not None else 0


def ends_of(group: CacheGroup, asked: Asked) -> str:
    """ "1" at `n` if a group can serve a hit that ends `n` of its blocks after those that vLLM has.

    As long numbers in few operations: a look at each window of a long prompt costs too much.
    """
    bits = _bits(group, asked)
    base = asked.computed // group.block_tokens
    count = (asked.limit - asked.computed) // group.block_tokens
    if group.chunk_tokens is not None:
        return _ends_of_chunks(group, bits, base, count)
    if group.window_blocks is None:
        # The ones before the first zero.
        return "1" * (_ones(bits) + 1) + "0" * count
    # What vLLM has lies below, and counts as there.
    wide, done = group.window_blocks, 1
    runs = bits << wide | (1 << wide) - 1
    while done < wide:
        step = min(done, wide - done)
        runs &= runs >> step
        done += step
    return f"{runs:0{count + 1}b}"[::-1]


def _ends_of_chunks(group: CacheGroup, bits: int, base: int, count: int) -> str:
    """`ends_of` where a token needs what is before it in its own chunk: one look at each chunk."""
    ends, at = "1", 1
    while at <= count:
        begin = group.needed_from(base + at)
        assert group.chunk_tokens is not None
        chunk = (base + at) * group.block_tokens // group.chunk_tokens
        # Ends up to this one lie in the same chunk.
        last = min(count, ((chunk + 1) * group.chunk_tokens - 1) // group.block_tokens - base)
        own = max(begin - base, 0)
        there = _ones(bits >> own & (1 << last - own) - 1)
        served = min(max(own + there - at + 1, 0), last - at + 1)
        ends += "1" * served + "0" * (last - at + 1 - served)
        at = last + 1
    return ends


def _ones(bits: int) -> int:
    """How many bits from the first on are set."""
    return (~bits & (bits + 1)).bit_length() - 1


def _tail(group: CacheGroup, asked: Asked, end: int) -> Held:
    """What a group has to load for a hit that ends at token `end`, which it can serve."""
    base = asked.computed // group.block_tokens
    last = end // group.block_tokens
    begin = max(base, group.needed_from(last))
    below = _bits(group, asked) & ((1 << (begin - base)) - 1)
    return Held(group, asked.answers[group.number].lease, below.bit_count(), begin, last)


def loads_of(answer: Answer, blocks: Sequence[Sequence[int]], tokens: int) -> list[GroupLoad]:
    """What to load for the first `tokens` of an answer into a request's blocks, by group of vLLM.

    The null block (0) stands at positions that vLLM does not need: they come first, and are left
    out. Raises ValueError if vLLM has other blocks than the answer is for, or takes less than was
    offered of a window, whose blocks before the new end nobody has asked for: what vLLM takes for
    computed and nobody loads would be wrong bytes.
    """
    if answer.exact and tokens != answer.tokens:
        raise ValueError(f"{tokens} of {answer.tokens} tokens leave a window incomplete")
    loads = []
    for held in answer.held:
        end = min(held.end, (answer.computed + tokens) // held.group.block_tokens)
        own = blocks[held.group.index]
        if len(own) < end:
            raise ValueError(f"group {held.group.index}: {len(own)} blocks for {end}")
        base = answer.computed // held.group.block_tokens
        if any(own[base : held.begin]):
            raise ValueError(
                f"group {held.group.index}: vLLM wants blocks {base} to {held.begin - 1}, which"
                " no token of this group needs"
            )
        begin = held.begin
        while begin < end and own[begin] == 0:
            begin += 1
        if begin < end:
            first = held.first + begin - held.begin
            loads.append(GroupLoad(held.group.number, held.lease, first, list(own[begin:end])))
    return loads
