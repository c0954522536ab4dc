"""This process's connection to the daemon, and what is said about it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pegaflow.client import Client, LogLevel, Options
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.stats import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

#: Requests not yet consumed: saves of many steps and loads of many requests at once.
COMPLETION_SLOTS = 4096
RING_SLOTS = 2048
#: Lists under way: two prompts of 262,144 blocks.
ARENA_BYTES = 32 << 20


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
    """Turns the client's totals into what happened since the last look."""

    def __init__(self, totals: Callable[[], tuple[int, int]]) -> None:
        self._totals = totals
        self._seen = (0, 0)

    def count(self, counters: Counters) -> None:
        """Adds the losses and returns of the daemon since the last call."""
        now = self._totals()
        counters.add("daemon_losses", now[0] - self._seen[0])
        counters.add("daemon_returns", now[1] - self._seen[1])
        self._seen = now


def transitions(client: Client) -> tuple[int, int]:
    """How often the daemon was lost and found again."""
    stats = client.stats()
    return stats.disconnects, stats.reconnects
