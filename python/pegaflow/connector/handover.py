"""From a worker to the scheduler of the same process, past vLLM: loads that ended well.

A scheduler that is a step ahead of its worker looks at what a step brought only once the next one
is submitted, and between steps without tokens vLLM sleeps. Where both are in one process, the
scheduler need not wait for that.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

#: By the engine's id. The worker's end keeps it alive.
_OFFERED: WeakValueDictionary[str, HandOver] = WeakValueDictionary()


class HandOver:
    """One engine's. Its worker and its scheduler are one thread."""

    def __init__(self) -> None:
        #: A scheduler looks for what is put here.
        self.accepted = False
        self._loaded: set[str] = set()

    def put(self, loaded: set[str]) -> None:
        """The worker: these requests' blocks are there."""
        self._loaded |= loaded

    def take(self) -> set[str]:
        """The scheduler: what was put since the last call."""
        loaded, self._loaded = self._loaded, set()
        return loaded

    @property
    def pending(self) -> bool:
        """The scheduler has not looked yet."""
        return bool(self._loaded)


def offer(engine: str) -> HandOver:
    """The only worker of an engine."""
    handover = _OFFERED[engine] = HandOver()
    return handover


def accept(engine: str) -> HandOver | None:
    """The engine's scheduler. None: the worker is in another process."""
    handover = _OFFERED.get(engine)
    if handover is not None:
        handover.accepted = True
    return handover
