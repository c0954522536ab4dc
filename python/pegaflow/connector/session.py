"""This process's connection to the daemon, and what is said about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pegaflow.client import Client, LogLevel, Options
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.stats import Counters

#: Requests not yet consumed: saves of many steps and loads of many requests at once.
COMPLETION_SLOTS = 4096
RING_SLOTS = 2048
#: Lists under way: two prompts of 262,144 blocks.
ARENA_BYTES = 32 << 20
#: How often the connection's counters are looked at.
WATCH_S = 0.5


def connect(config: ConnectorConfig, name: str, logger: logging.Logger) -> Client:
    """A client of the node's daemon, named in the daemon's tables.

    Raises what `Client` raises; without a daemon only if `start_without_daemon` is off.
    """

    def log(level: LogLevel, line: str) -> None:
        logger.log(logging.WARNING if level == LogLevel.WARN else logging.INFO, "%s", line)

    return Client(
        Options(
            node=config.node,
            socket=config.socket,
            client_name=name[:128],
            autostart=config.autostart,
            daemon=config.daemon,
            start_without_daemon=config.start_without_daemon,
            ring_slots=RING_SLOTS,
            completion_slots=COMPLETION_SLOTS,
            arena_bytes=ARENA_BYTES,
            log=log,
        )
    )


class Watch:
    """Turns a client's totals into what happened since the last look."""

    def __init__(self, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._seen = (0, 0)
        self._next = 0.0

    def count(self, counters: Counters) -> None:
        """Adds the losses and returns of the daemon since the last call. It looks now and then
        only: it is called in every step."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + WATCH_S
        stats = self._client.stats()
        counters.add("daemon_losses", stats.disconnects - self._seen[0])
        counters.add("daemon_returns", stats.reconnects - self._seen[1])
        self._seen = (stats.disconnects, stats.reconnects)
