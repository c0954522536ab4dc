"""Questions whose answers take time, with a daemon that answers as told."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from pegaflow.client import (
    Client,
    Completion,
    Fetch,
    Op,
    Reason,
    Registration,
    State,
    Status,
    TimeoutError,
)
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.lookup import Lookup, Prompt
from pegaflow.connector.stats import Counters

from .engine_support import FULL, Request, tokens


def answer(request: int, status: Status, count: int = 0, lease: int = 0) -> Completion:
    return Completion(
        Op.QUERY, status, Reason.NONE, request, lease, count, 0, 0, 0, 30_000, 0, None, ""
    )


class Slow:
    """A client and a registration: blocks come up for ever, and two are in the pool."""

    state = State.CONNECTED

    def __init__(self) -> None:
        self.asked: list[Fetch] = []
        #: Keys and ways of questions about no block.
        self.ended: list[tuple[int, Fetch]] = []
        self.keys: list[int] = []
        #: Answers come by `poll` alone.
        self.late = False
        self.arrived: list[Completion] = []
        self.released: list[int] = []
        self.now = 0.0

    def query(self, key: int, hashes: bytes, *, fetch: Fetch, **_: Any) -> int:
        if hashes == bytes(32):
            self.ended.append((key, fetch))
            return 2000 + key
        assert len(hashes) == 6 * 32
        self.keys.append(key)
        self.asked.append(fetch)
        return len(self.asked)

    def wait(self, request: int, timeout_ms: int) -> Completion:
        assert timeout_ms <= 10
        if self.late:
            raise TimeoutError(Status.TIMEOUT, "")
        if self.asked[request - 1] == Fetch.NEVER:
            return answer(request, Status.OK, count=2, lease=7)
        return answer(request, Status.LOADING, count=2)

    def release(self, lease: int) -> int:
        self.released.append(lease)
        return 1000 + lease

    def poll(self) -> list[Completion]:
        arrived, self.arrived = self.arrived, []
        return arrived


def lookup(slow: Slow, config: ConnectorConfig) -> Lookup:
    return Lookup(
        cast("Client", slow),
        cast("Registration", slow),
        [FULL],
        config,
        Counters(),
        logging.getLogger("test"),
        lambda: slow.now,
    )


def test_while_blocks_come_up_vllm_is_told_to_ask_again_and_the_daemon_not_at_every_step() -> None:
    slow = Slow()
    asking = lookup(slow, ConnectorConfig(loading_timeout_ms=1000))
    request, prompt = Request(tokens(100)), Prompt(1)
    for at in range(100):
        slow.now = at / 10_000
        assert asking.find(prompt, request.block_hashes, 0, 99) is None
    assert slow.asked == [Fetch.POLL] * 5


def test_blocks_that_do_not_come_up_in_time_are_done_without() -> None:
    slow = Slow()
    asking = lookup(slow, ConnectorConfig(loading_timeout_ms=1000))
    request, prompt = Request(tokens(100)), Prompt(1)
    assert asking.find(prompt, request.block_hashes, 0, 99) is None
    slow.now = 1.5
    assert asking.find(prompt, request.block_hashes, 0, 99) is None
    # What is in the pool is loaded all the same.
    assert asking.find(prompt, request.block_hashes, 0, 99) == 32
    assert slow.asked == [Fetch.POLL, Fetch.POLL, Fetch.NEVER]
    asking.forget(prompt)
    assert slow.released == [7]
    assert slow.keys == [1] * 3
    assert not slow.ended


def test_blocks_that_come_up_for_a_request_that_is_over_are_left_where_they_are() -> None:
    slow = Slow()
    asking = lookup(slow, ConnectorConfig())
    request, prompt = Request(tokens(100)), Prompt(1)
    assert asking.find(prompt, request.block_hashes, 0, 99) is None
    asking.forget(prompt)
    assert slow.ended == [(1, Fetch.NEVER)]
    # Once.
    asking.forget(prompt)
    # What is asked under the old key from now on would get what is given back.
    assert asking.find(prompt, request.block_hashes, 0, 99) is None
    assert len(set(slow.keys)) == len(slow.keys) == 2
    assert slow.ended == [(1, Fetch.NEVER)]


@pytest.mark.parametrize("first", ["the answer", "the end"])
def test_a_late_answer_that_blocks_come_up_ends_that_too(first: str) -> None:
    slow = Slow()
    slow.late = True
    asking = lookup(slow, ConnectorConfig())
    prompt = Prompt(1)
    assert asking.find(prompt, Request(tokens(100)).block_hashes, 0, 99) is None
    for what in (first, "the end" if first == "the answer" else "the answer"):
        if what == "the end":
            asking.forget(prompt)
        else:
            slow.arrived = [answer(1, Status.LOADING, count=2)]
            asking.poll()
    assert slow.ended == [(1, Fetch.NEVER)]
    slow.arrived = [answer(2001, Status.OK)]
    asking.poll()
    assert slow.ended == [(1, Fetch.NEVER)]
    assert not slow.released
