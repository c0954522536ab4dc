"""An engine without vLLM: the connector's scheduler and worker over a real daemon, requests and
blocks as vLLM would have them, and KV memory whose bytes follow from the tokens."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pegaflow.client import Group, Mode, Namespace, State
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.groups import CacheGroup
from pegaflow.connector.lookup import Lookup
from pegaflow.connector.meta import StepMeta
from pegaflow.connector.scheduler import Scheduler, Step
from pegaflow.connector.worker import Results, Worker

from .support import SOON_MS, Daemon, eventually

LOGGER = logging.getLogger("pegaflow.test")
BLOCK_TOKENS = 16
BLOCK_BYTES = 256
FULL = CacheGroup(index=0, number=0, block_tokens=BLOCK_TOKENS, hashes_per_block=1)

_numbers = iter(range(1 << 62))


@dataclass(eq=False)
class Request:
    """A request as the connector sees it."""

    tokens: list[int]
    request_id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    num_computed_tokens: int = 0
    lora_request: object = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def all_token_ids(self) -> list[int]:
        return self.tokens

    @property
    def block_hashes(self) -> list[bytes]:
        found, parent = [], b"\0" * 32
        for at in range(len(self.tokens) // BLOCK_TOKENS):
            own = self.tokens[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS]
            parent = hashlib.sha256(parent + repr(own).encode()).digest()
            found.append(parent)
        return found


class Pool:
    """vLLM's block pool: counts the users of each block."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.users: Counter[int] = Counter()
        #: Blocks that vLLM finds by name, in group 1.
        self.named: dict[bytes, int] = {}

    def hold(self, blocks: Sequence[int]) -> None:
        self.users.update(blocks)

    def drop(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self.users[block] > 0, f"block {block} is dropped more often than it was held"
            self.users[block] -= 1

    def cached(self, name: bytes, group: int) -> int | None:
        assert group == 1
        return self.named.get(name)

    @property
    def held(self) -> set[int]:
        return {block for block, users in self.users.items() if users}


class Engine:
    """One replica with `world_size` ranks in this process."""

    def __init__(
        self,
        daemon: Daemon,
        *,
        name: str | None = None,
        config: ConnectorConfig | None = None,
        groups: Sequence[CacheGroup] = (FULL,),
        blocks: int = 64,
        world_size: int = 1,
        model: str = "engine-test",
        with_events: bool = False,
    ) -> None:
        config = config or ConnectorConfig()
        self.config, self.groups, self.blocks = config, list(groups), blocks
        self.namespace = Namespace(
            block_tokens=BLOCK_TOKENS, model=model, dtype="float16", hash_algorithm="test"
        )
        instance = name or f"engine-{next(_numbers)}"
        mode = Mode.READ_WRITE if config.mode.loads else Mode.SAVE_ONLY
        self.memory = []
        self.workers = []
        # Each process of an engine has a client of its own.
        self.client = daemon.client()
        self.clients = [self.client, *(daemon.client() for _ in range(world_size))]
        for rank, own in enumerate(self.clients[1:]):
            memory = own.alloc_host(blocks * BLOCK_BYTES * len(groups))
            self.memory.append(memory.view())
            worker = Worker(own, LOGGER)
            described = []
            for at, group in enumerate(groups):
                size = blocks * BLOCK_BYTES
                view = memory.view(at * size, size).cast("B", [blocks, BLOCK_BYTES])
                described.append(Group.of(view, group=group.number))
            worker.register(
                instance,
                self.namespace,
                sorted(described, key=lambda one: one.group),
                rank,
                world_size,
                mode,
            )
            self.workers.append(worker)
        self.scheduler = Scheduler(config, groups, world_size, LOGGER, with_events=with_events)
        self.pool = Pool(blocks)
        self.scheduler.bind(self.pool)
        if config.mode.loads:
            registration = self.client.register_scheduler(
                instance, self.namespace, world_size=world_size, mode=mode
            )
            registration.wait_ready(SOON_MS)
            self.lookup = Lookup(
                self.client, registration, groups, config, self.scheduler.counters, LOGGER
            )
            self.scheduler.attach(self.lookup)

    def close(self) -> None:
        """Its processes end."""
        for client in self.clients:
            client.close()

    @property
    def away(self) -> bool:
        """All its processes have noticed that the daemon is gone."""
        return all(client.state == State.DISCONNECTED for client in self.clients)

    # ------------------------------------------------------------ bytes

    def pattern(self, name: bytes, rank: int, group: int) -> bytes:
        """What a block of this name holds on a rank."""
        seed = hashlib.sha256(name + bytes([rank, group])).digest()
        return (seed * (BLOCK_BYTES // len(seed)))[:BLOCK_BYTES]

    def page(self, block: int, rank: int = 0, group: int = 0) -> memoryview:
        at = (group * self.blocks + block) * BLOCK_BYTES
        return self.memory[rank][at : at + BLOCK_BYTES]

    def compute(self, request: Request, blocks: Sequence[Sequence[int]], upto: int) -> None:
        """The model's work: writes all blocks that are complete before `upto` tokens."""
        for at, group in enumerate(self.groups):
            names = group.names(request.block_hashes, 0, upto // group.block_tokens)
            for block, name in zip(blocks[at], names, strict=False):
                for rank in range(len(self.workers)):
                    self.page(block, rank, at)[:] = self.pattern(name, rank, at)

    def verify(self, request: Request, blocks: Sequence[Sequence[int]], upto: int) -> None:
        for at, group in enumerate(self.groups):
            names = group.names(request.block_hashes, 0, upto // group.block_tokens)
            for block, name in zip(blocks[at], names, strict=False):
                for rank in range(len(self.workers)):
                    if block:
                        assert self.page(block, rank, at) == self.pattern(name, rank, at)

    # ------------------------------------------------------------ steps

    def find(self, request: Request, computed: int = 0) -> int:
        """Asks until the answer is there."""
        found: list[int] = []

        def asked() -> bool:
            tokens, later = self.scheduler.matched(request, computed)
            assert later == bool(tokens)
            if tokens is not None:
                found.append(tokens)
            return tokens is not None

        eventually(asked, "the query is answered")
        return found[0]

    def step(self, meta: StepMeta) -> Results:
        """All ranks do what the step says; what ended is told to the scheduler."""
        merged = Results(set(), set(), set())
        for worker in self.workers:
            worker.start_loads(meta.loads, None)
            worker.start_saves(meta.saves, None)
        for worker in self.workers:
            results = worker.results()
            merged.loaded |= results.loaded
            merged.failed |= results.failed
            merged.failed_blocks |= results.failed_blocks
            report = worker.report()
            if report is not None:
                self.scheduler.report(report)
        return merged

    def idle(self) -> Results:
        """A step without work."""
        return self.step(self.scheduler.build(Step([], [], {})))

    def run(self, request: Request, blocks: Sequence[Sequence[int]], computed: int = 0) -> StepMeta:
        """Computes the rest of a prompt in one step."""
        request.num_computed_tokens = computed
        rest = request.num_tokens - computed
        self.scheduler.allocated(request, blocks, 0)
        meta = self.scheduler.build(
            Step([(request.request_id, blocks, computed)], [], {request.request_id: rest})
        )
        self.compute(request, blocks, request.num_tokens)
        self.step(meta)
        request.num_computed_tokens = request.num_tokens
        return meta

    def save(self, request: Request, blocks: Sequence[Sequence[int]]) -> None:
        """Computes a prompt and waits until it is saved."""
        self.run(request, blocks)
        self.scheduler.finished(request)
        self.drain()

    def save_prompt(self) -> list[int]:
        """Saves a prompt of 100 tokens, six whole blocks, and returns it."""
        prompt = tokens(100)
        self.save(Request(prompt), [[1, 2, 3, 4, 5, 6, 7]])
        return prompt

    def drain(self) -> None:
        """Steps until no save is under way."""

        def quiet() -> bool:
            self.idle()
            return not self.scheduler.saves_pending

        eventually(quiet, "all saves end")

    def load(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> Results:
        """Loads what was found, and waits for it."""
        self.scheduler.allocated(request, blocks, tokens)
        total = Results(set(), set(), set())

        def add(results: Results) -> bool:
            total.loaded |= results.loaded
            total.failed |= results.failed
            total.failed_blocks |= results.failed_blocks
            return request.request_id in total.loaded and not any(
                worker.busy for worker in self.workers
            )

        if not add(self.step(self.scheduler.build(Step([], [], {})))):
            eventually(lambda: add(self.idle()), "the load ends")
        return total


class Make(Protocol):
    """Makes engines, with the arguments of `Engine`."""

    def __call__(
        self,
        *,
        config: ConnectorConfig | None = None,
        groups: Sequence[CacheGroup] = (FULL,),
        blocks: int = 64,
        world_size: int = 1,
        model: str = "engine-test",
        with_events: bool = False,
    ) -> Engine: ...


def tokens(count: int, seed: int = 0) -> list[int]:
    """A prompt."""
    return [seed * 1_000_003 + at for at in range(count)]
