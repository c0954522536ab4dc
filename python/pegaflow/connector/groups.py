"""The cache groups of the model as the connector sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheGroup:
    """One group of vLLM."""

    #: Its place in vLLM's list of groups.
    index: int
    #: Its number at the daemon: 0 has prefix semantics.
    number: int
    #: Tokens of one block.
    block_tokens: int
    #: Hashes of vLLM per block of this group.
    hashes_per_block: int
    #: Blocks that a token needs before its own: None is all, else the last so many.
    window_blocks: int | None = None
    #: vLLM leaves out blocks before a window, also where `window_blocks` is None.
    sliding: bool = False
    #: A token needs no block before its own chunk of so many tokens.
    chunk_tokens: int | None = None
    #: A block holds the state after its last token: it alone stands for all before it. vLLM keeps
    #: some of a request's states, and tells by their names where.
    recurrent: bool = False

    @property
    def whole(self) -> bool:
        """A hit needs all of a prefix: then it can be cut short."""
        return self.window_blocks is None and self.chunk_tokens is None

    def needed_from(self, end: int) -> int:
        """The first block that a hit needs which ends before block `end`."""
        if self.chunk_tokens is not None:
            tokens = end * self.block_tokens
            return tokens // self.chunk_tokens * self.chunk_tokens // self.block_tokens
        return 0 if self.window_blocks is None else max(0, end - self.window_blocks)

    def names(self, hashes: Sequence[bytes], first: int, last: int) -> Sequence[bytes]:
        """The names of blocks `first` to `last - 1`. A hash of vLLM contains its predecessors, so
        the last one of a block names all of it."""
        ratio = self.hashes_per_block
        if ratio == 1:
            return hashes[first:last]
        return hashes[(first + 1) * ratio - 1 : last * ratio : ratio]


def window_blocks(window_tokens: int, block_tokens: int) -> int:
    """How many blocks before a block boundary a sliding window reaches into: the token after the
    boundary sees the `window_tokens - 1` tokens before it."""
    return max(1, -(-(window_tokens - 1) // block_tokens))
