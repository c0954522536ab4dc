"""Hashes, block ids and bitmaps as the library reads them, without a Python loop per element."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from math import prod
from typing import Any

from pegaflow.client._abi import HASH_BYTES

#: Hashes of blocks: a sequence of `bytes`, or one contiguous buffer of 32 bytes for each.
Hashes = Sequence[bytes] | bytes | bytearray | memoryview | Any

#: Block ids: a sequence of `int`, or a buffer or array of integers.
Blocks = Sequence[int] | Any

assert array("I").itemsize == 4

U16 = 0xFFFF
I32 = 0x7FFF_FFFF
U32 = 0xFFFF_FFFF
U64 = 0xFFFF_FFFF_FFFF_FFFF


def fits(name: str, value: int, most: int) -> int:
    """The value; ctypes would cut off what does not fit. Raises ValueError."""
    if not 0 <= value <= most:
        raise ValueError(f"{name} {value} is not in 0 to {most}")
    return value


class Words:
    """A list in memory: its address, its length, and what keeps it there."""

    __slots__ = ("address", "count", "keep")

    def __init__(self, address: Any, count: int, keep: object) -> None:
        #: What ctypes takes for `void *`: an integer, `bytes` or an array; never NULL.
        self.address = address
        self.count = count
        self.keep = keep


def pack_hashes(hashes: Sequence[bytes], width: int = HASH_BYTES) -> bytes:
    """One buffer of 32 bytes for each hash, to be built once and used often.

    All hashes have `width` bytes; where that is less than 32 they are filled up with zero bytes.
    To look at each hash would take three times as long as to pack them all: lengths are compared in
    sum, which finds any hash function but not a list whose lengths make up for each other.

    Raises ValueError where the sum is not that of hashes of `width` bytes.
    """
    if not 1 <= width <= HASH_BYTES:
        raise ValueError(f"hashes of {width} bytes: a hash has 1 to {HASH_BYTES}")
    if not hashes:
        return b""
    padding = bytes(HASH_BYTES - width)
    packed = padding.join(hashes) + padding if padding else b"".join(hashes)
    if len(packed) != HASH_BYTES * len(hashes):
        at, wrong = next((at, len(one)) for at, one in enumerate(hashes) if len(one) != width)
        raise ValueError(f"hash {at} has {wrong} bytes, not {width}: see pack_hashes(width=)")
    return packed


def hash_list(hashes: Hashes) -> Words:
    """Any accepted form of hashes; a buffer is not copied where its address can be had.

    Raises ValueError for a buffer that is no whole number of hashes or not contiguous.
    """
    if isinstance(hashes, bytes):
        return _whole(len(hashes), hashes)
    to_numpy = getattr(hashes, "numpy", None)
    if callable(to_numpy):
        # A torch tensor, which is no buffer by itself.
        hashes = to_numpy()
    interface: dict[str, Any] | None = getattr(hashes, "__array_interface__", None)
    if interface is not None:
        if interface.get("strides") is not None:
            raise ValueError(_NOT_CONTIGUOUS)
        size = int(interface["typestr"][2:]) * prod(interface["shape"])
        return _whole(size, int(interface["data"][0]), hashes)
    if isinstance(hashes, (bytearray, memoryview, array)):
        view = memoryview(hashes)
        if not view.c_contiguous:
            raise ValueError(_NOT_CONTIGUOUS)
        size = view.nbytes
        if view.readonly or not size:
            return _whole(size, bytes(view))
        return _whole(size, (ctypes.c_char * size).from_buffer(view))
    packed = pack_hashes(hashes)
    return _whole(len(packed), packed)


_NOT_CONTIGUOUS = "a buffer of hashes must be contiguous"


def _whole(size: int, address: Any, keep: object = None) -> Words:
    if size % HASH_BYTES:
        raise ValueError(f"a buffer of {size} bytes is no whole number of hashes of {HASH_BYTES}")
    return Words(address if size else b"", size // HASH_BYTES, (address, keep))


def block_list(blocks: Blocks) -> Words:
    """Any accepted form of block ids as 32-bit words.

    Raises ValueError for an id that is no unsigned 32-bit number, TypeError for other elements.
    """
    if isinstance(blocks, (bytes, bytearray)):
        raise TypeError(f"{type(blocks).__name__} says nothing about the size of a block id")
    if hasattr(blocks, "tolist") and not isinstance(blocks, array):
        blocks = blocks.tolist()
    try:
        words = array("I", blocks)
    except OverflowError as error:
        raise ValueError(f"a block id is no unsigned 32-bit number: {error}") from None
    address, count = words.buffer_info()
    return Words(address if count else b"", count, words)


class Bitmap:
    """Bits of positions, written by the library into memory of this object."""

    __slots__ = ("_words", "count")

    def __init__(self, count: int) -> None:
        #: Positions it speaks of.
        self.count = count
        self._words = (ctypes.c_uint64 * max(1, (count + 63) // 64))()

    @property
    def address(self) -> int:
        """Of the first word."""
        return ctypes.addressof(self._words)

    @property
    def words(self) -> int:
        """How many words of 64 bits there are."""
        return len(self._words)

    def to_bytes(self) -> bytes:
        """Bit `i % 8` of byte `i // 8` belongs to position `i`."""
        return bytes(self._words)[: (self.count + 7) // 8]

    def to_int(self) -> int:
        """Bit `i` belongs to position `i`."""
        return int.from_bytes(bytes(self._words), "little")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> bool:
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} of {self.count}")
        return bool(self._words[position // 64] >> position % 64 & 1)

    def positions(self) -> list[int]:
        """The positions whose bit is set, in order."""
        bits = bin(self.to_int())[:1:-1]
        found, at = [], bits.find("1")
        while at >= 0:
            found.append(at)
            at = bits.find("1", at + 1)
        return found
