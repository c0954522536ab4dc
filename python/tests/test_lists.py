"""Hashes, block ids and bitmaps in every form that is taken."""

from __future__ import annotations

import ctypes
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pegaflow.client import pack_hashes
from pegaflow.client._lists import Bitmap, Words, block_list, hash_list

from .support import hashes


def content(words: Words, item_bytes: int) -> bytes:
    address = words.address
    if not isinstance(address, int):
        address = (
            ctypes.c_void_p.from_buffer_copy(ctypes.c_char_p(words.address)).value
            if isinstance(address, bytes)
            else ctypes.addressof(address)
        )
    return ctypes.string_at(address, words.count * item_bytes)


PACKED = b"".join(hashes(3))
READ_ONLY = np.frombuffer(PACKED, dtype=np.uint8).reshape(3, 32)


@pytest.mark.parametrize(
    "given",
    [
        hashes(3),
        tuple(hashes(3)),
        PACKED,
        bytearray(PACKED),
        memoryview(PACKED),
        memoryview(bytearray(PACKED)),
        READ_ONLY,
        READ_ONLY.copy(),
        READ_ONLY.copy().view("S32"),
        READ_ONLY.copy().view("V32"),
        array("Q", PACKED),
        SimpleNamespace(numpy=READ_ONLY.copy),
    ],
    ids=lambda given: type(given).__name__,
)
def test_hashes_are_taken_in_every_form(given: Any) -> None:
    words = hash_list(given)
    assert words.count == 3
    assert content(words, 32) == PACKED


@pytest.mark.parametrize("buffer", [READ_ONLY, READ_ONLY.copy()], ids=["read-only", "writable"])
def test_an_array_of_hashes_is_not_copied(buffer: Any) -> None:
    words = hash_list(buffer)
    assert words.address == buffer.ctypes.data


def test_a_writable_buffer_of_hashes_is_not_copied() -> None:
    buffer = bytearray(PACKED)
    words = hash_list(buffer)
    buffer[0] ^= 0xFF
    assert content(words, 32) == bytes(buffer)


def test_the_memory_of_hashes_is_kept_by_their_list() -> None:
    words = hash_list(READ_ONLY.copy())
    assert content(words, 32) == PACKED


@pytest.mark.parametrize("given", [[], b"", bytearray(), np.zeros((0, 32), np.uint8)])
def test_no_hashes_are_no_null_pointer(given: Any) -> None:
    words = hash_list(given)
    assert (words.count, words.address) == (0, b"")


@pytest.mark.parametrize("wrong", [b"short", bytes(33)])
def test_a_hash_of_another_length_is_named(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=f"hash 2 has {len(wrong)} bytes"):
        hash_list([*hashes(2), wrong])


def test_a_buffer_of_hashes_is_whole_and_contiguous() -> None:
    with pytest.raises(ValueError, match="no whole number"):
        hash_list(PACKED[:-1])
    with pytest.raises(ValueError, match="contiguous"):
        hash_list(READ_ONLY[:, ::2])
    with pytest.raises(TypeError):
        hash_list(["text"])


def test_short_hashes_are_filled_up() -> None:
    short = [bytes([at]) * 16 for at in range(1, 4)]
    assert pack_hashes(short, 16) == b"".join(one + bytes(16) for one in short)
    assert pack_hashes([], 16) == b""
    with pytest.raises(ValueError, match="hash 1 has 15 bytes"):
        pack_hashes([bytes(16), bytes(15)], 16)
    with pytest.raises(ValueError, match="1 to 32"):
        pack_hashes([bytes(33)], 33)


@pytest.mark.parametrize(
    "given",
    [
        [3, 0, 4_294_967_295],
        (3, 0, 4_294_967_295),
        array("I", [3, 0, 4_294_967_295]),
        array("q", [3, 0, 4_294_967_295]),
        np.array([3, 0, 4_294_967_295]),
        np.array([3, 0, 4_294_967_295], np.uint32),
        np.array([3, 9, 0, 9, 4_294_967_295])[::2],
    ],
    ids=lambda given: type(given).__name__,
)
def test_block_ids_are_taken_in_every_form(given: Any) -> None:
    words = block_list(given)
    assert words.count == 3
    assert content(words, 4) == array("I", [3, 0, 4_294_967_295]).tobytes()


@pytest.mark.parametrize("given", [[], (), np.zeros(0, np.int64)])
def test_no_blocks_are_no_null_pointer(given: Any) -> None:
    words = block_list(given)
    assert (words.count, words.address) == (0, b"")


@pytest.mark.parametrize("wrong", [-1, 1 << 32])
def test_a_block_id_beyond_32_bits_is_an_error(wrong: int) -> None:
    with pytest.raises(ValueError, match="unsigned 32-bit"):
        block_list([0, wrong])
    with pytest.raises(ValueError, match="unsigned 32-bit"):
        block_list(np.array([wrong]))


def test_block_ids_are_integers() -> None:
    for wrong in ([0.5], np.array([0.5]), [[0]], np.zeros((2, 2), np.int64), "01", bytes(4)):
        with pytest.raises(TypeError):
            block_list(wrong)


def test_a_bitmap_tells_its_positions() -> None:
    bitmap = Bitmap(130)
    bits = 1 << 129 | 1 << 64 | 1 << 63 | 1
    ctypes.memmove(bitmap.address, bits.to_bytes(24, "little"), 24)
    assert bitmap.positions() == [0, 63, 64, 129]
    assert [at for at in range(130) if bitmap[at]] == [0, 63, 64, 129]
    assert (len(bitmap), bitmap.words, bitmap.to_int()) == (130, 3, bits)
    assert int.from_bytes(bitmap.to_bytes(), "little") == bits
    assert len(bitmap.to_bytes()) == 17
    with pytest.raises(IndexError):
        bitmap[130]
    assert Bitmap(0).positions() == []
