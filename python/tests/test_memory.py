"""Segments out of tensors of every layout."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pegaflow.client import Group, Memory, Segment, segments_of, strided


def page(segments: list[Segment], block: int) -> bytes:
    """What the daemon would copy."""
    return b"".join(
        ctypes.string_at(one.address + block * one.block_stride, one.block_bytes)
        for one in segments
    )


def filled(*shape: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


def test_blocks_first_make_one_segment() -> None:
    tensor = filled(5, 2, 4, 8)
    (segment,) = segments_of(tensor)
    assert segment == Segment(tensor.ctypes.data, 128, 128, Memory.HOST)
    assert segment.owner is tensor
    assert page([segment], 3) == tensor[3].tobytes()


def test_keys_and_values_apart_make_two_segments() -> None:
    tensor = filled(2, 5, 4, 8)
    segments = segments_of(tensor, 1)
    assert [one.block_bytes for one in segments] == [64, 64]
    assert page(segments, 3) == tensor[0, 3].tobytes() + tensor[1, 3].tobytes()
    assert segments_of(tensor, -3) == segments


def test_the_order_in_memory_of_what_has_no_gaps_does_not_matter() -> None:
    tensor = filled(5, 2, 4, 8)
    swapped = tensor.transpose(0, 2, 3, 1)
    assert segments_of(swapped) == segments_of(tensor)
    keys_and_values = filled(2, 5, 4, 8).transpose(1, 0, 2, 3)
    assert len(segments_of(keys_and_values)) == 2


def test_a_layer_of_a_tensor_of_all_layers_keeps_the_distance_of_blocks() -> None:
    tensor = filled(5, 3, 16)
    for layer in range(3):
        (segment,) = segments_of(tensor[:, layer])
        assert (segment.block_stride, segment.block_bytes) == (96, 32)
        assert page([segment], 4) == tensor[4, layer].tobytes()
    (everything,) = segments_of(tensor)
    assert everything.block_bytes == 96


def test_padded_blocks_leave_the_padding_out() -> None:
    tensor = filled(5, 40)[:, :32]
    (segment,) = segments_of(tensor)
    assert (segment.block_stride, segment.block_bytes) == (80, 64)


def test_one_block_is_as_far_from_the_next_as_it_is_long() -> None:
    assert segments_of(filled(1, 8))[0].block_stride == 16


def test_a_buffer_is_a_tensor() -> None:
    memory = bytearray(range(48))
    (segment,) = segments_of(memoryview(memory).cast("B", [4, 12]))
    assert page([segment], 2) == bytes(range(24, 36))


class Torch:
    """What a torch tensor tells."""

    def __init__(self, device: str) -> None:
        self.shape = (2, 6, 4)
        self.device = SimpleNamespace(type=device)

    def data_ptr(self) -> int:
        return 4096

    def stride(self) -> tuple[int, ...]:
        return (24, 4, 1)

    def element_size(self) -> int:
        return 2


@pytest.mark.parametrize(("device", "memory"), [("cpu", Memory.HOST), ("cuda", Memory.CUDA)])
def test_a_torch_tensor_is_known_by_its_methods(device: str, memory: Memory) -> None:
    keys, values = segments_of(Torch(device), 1)
    assert keys == Segment(4096, 8, 8, memory)
    assert values == Segment(4096 + 48, 8, 8, memory)


def test_a_tensor_of_another_device_is_refused() -> None:
    with pytest.raises(TypeError, match="device 'xpu'"):
        segments_of(Torch("xpu"))


def test_an_array_in_gpu_memory_is_known_by_its_interface() -> None:
    interface = {"data": (8192, False), "shape": (6, 4), "typestr": "<f2", "strides": None}
    (segment,) = segments_of(SimpleNamespace(__cuda_array_interface__=interface))
    assert segment == Segment(8192, 8, 8, Memory.CUDA)


@pytest.mark.parametrize(
    ("tensor", "error", "words"),
    [
        (filled(5, 0), ValueError, "no bytes"),
        (np.broadcast_to(filled(1, 8), (5, 8)).view(), TypeError, "read-only"),
        (filled(5, 8)[:, ::-1], ValueError, "runs backwards"),
        (filled(4000, 2).reshape(2, 2000, 2).transpose(0, 2, 1), ValueError, "1024"),
        (np.array(["text"]), TypeError, "type <U4"),
        (b"bytes", TypeError, "read-only bytes"),
        (7, TypeError, "int is no tensor"),
    ],
)
def test_what_cannot_be_kv_memory_is_refused(
    tensor: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        segments_of(tensor, 1 if words == "1024" else 0)


def test_overlapping_blocks_are_refused() -> None:
    tensor = filled(40)
    windows = np.lib.stride_tricks.as_strided(tensor, (4, 8), (8, 2))
    with pytest.raises(ValueError, match="overlaps"):
        segments_of(windows)


def test_a_dimension_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="block_dim 2 of a tensor with 2"):
        segments_of(filled(4, 4), 2)


def test_a_group_has_the_segments_of_its_tensors_in_order() -> None:
    layers = [filled(2, 6, 8) for _ in range(3)]
    group = Group.of(layers, block_dim=1, group=2, replicated=True)
    assert group.segments == [one for layer in layers for one in segments_of(layer, 1)]
    assert (group.num_blocks, group.page_bytes) == (6, 96)
    assert (group.group, group.replicated) == (2, True)
    with pytest.raises(ValueError, match=r"not \[5, 6\]"):
        Group.of([filled(6, 8), filled(5, 8)])


def test_what_was_looked_at_can_be_given_as_it_is() -> None:
    tensor = filled(4, 4)
    assert segments_of(strided(tensor)) == segments_of(tensor)
