"""Holds vLLM's blocks while they are being saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Holder(Protocol):
    """Keeps blocks from being given to another request."""

    @property
    def total(self) -> int:
        """How many blocks vLLM has."""
        ...

    def hold(self, blocks: Sequence[int]) -> None:
        """Counts one more user of each; they are in use now."""
        ...

    def drop(self, blocks: Iterable[int]) -> None:
        """Counts one user less."""
        ...

    def cached(self, name: bytes, group: int) -> int | None:
        """The block of a group of vLLM that vLLM finds under this hash."""
        ...


class PoolHolder:
    """By the reference counts of vLLM's block pool: what is preempted, aborted, finished, or slides
    out of a window stays as it is until its save is done, and nobody waits for that."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    @property
    def total(self) -> int:
        return len(self._pool.blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        all_blocks = self._pool.blocks
        self._pool.touch([all_blocks[block] for block in blocks])

    def drop(self, blocks: Iterable[int]) -> None:
        all_blocks = self._pool.blocks
        # The last one first: a prefix is worth more than its end.
        self._pool.free_blocks([all_blocks[block] for block in blocks][::-1])

    def cached(self, name: bytes, group: int) -> int | None:
        found = self._pool.get_cached_block(name, [group])
        return None if found is None else int(found[0].block_id)
