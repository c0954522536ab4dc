"""Layouts of vLLM's KV cache, as tensors of a few bytes whose every byte is followed."""

from __future__ import annotations

import itertools
from math import prod

import pytest

from pegaflow.client import Memory, Strided
from pegaflow.connector.layout import GroupLayout, Layer, LayoutError, group_layout

BLOCKS = 6


def tensor(
    shape: tuple[int, ...], order: tuple[int, ...] | None = None, address: int = 4096, size: int = 2
) -> Strided:
    """A tensor of a shape whose dimensions lie in memory in an order, the outermost first."""
    order = order or tuple(range(len(shape)))
    strides = [0] * len(shape)
    step = size
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return Strided(address, shape, tuple(strides), size, Memory.HOST)


def bytes_of_block(view: Strided, block_dim: int, block: int, ratio: int = 1) -> set[int]:
    """The addresses that belong to a block of vLLM, found out element by element."""
    ranges = [range(extent) for extent in view.shape]
    ranges[block_dim] = range(block * ratio, (block + 1) * ratio)
    found: set[int] = set()
    for index in itertools.product(*ranges):
        at = view.address + sum(i * s for i, s in zip(index, view.strides, strict=True))
        found.update(range(at, at + view.itemsize))
    return found


def bytes_of_segments(layout: GroupLayout, block: int) -> list[int]:
    return [
        at
        for segment in layout.segments
        for at in range(
            segment.address + block * segment.block_stride,
            segment.address + block * segment.block_stride + segment.block_bytes,
        )
    ]


LAYOUTS = [
    ("NHD, keys and values in one block", tensor((BLOCKS, 2, 4, 3, 5)), 0, 1),
    ("HND", tensor((BLOCKS, 2, 4, 3, 5), (0, 1, 3, 2, 4)), 0, 1),
    ("keys and values apart", tensor((2, BLOCKS, 4, 3, 5)), 1, 2),
    ("keys and values apart, HND", tensor((2, BLOCKS, 4, 3, 5), (0, 1, 3, 2, 4)), 1, 2),
    ("shaped apart, laid out together", tensor((2, BLOCKS, 4, 3, 5), (1, 0, 2, 3, 4)), 1, 1),
    ("heads outside of blocks", tensor((BLOCKS, 3, 4, 5), (1, 0, 2, 3)), 0, 3),
    ("MLA", tensor((BLOCKS, 4, 9), size=1), 0, 1),
    ("all layers side by side", tensor((BLOCKS, 3, 2, 4, 5)), 0, 1),
]


@pytest.mark.parametrize(
    ("view", "dim", "segments"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS]
)
def test_segments_are_exactly_the_bytes_of_each_block(
    view: Strided, dim: int, segments: int
) -> None:
    layout = group_layout([Layer("layer", view, dim)], BLOCKS)
    assert len(layout.segments) == segments
    for block in range(BLOCKS):
        found = bytes_of_segments(layout, block)
        assert len(found) == len(set(found))
        assert set(found) == bytes_of_block(view, dim, block)


@pytest.mark.parametrize(
    ("view", "dim"),
    [
        (tensor((BLOCKS * 2, 2, 4, 3)), 0),
        (tensor((2, BLOCKS * 2, 4, 3)), 1),
        (tensor((BLOCKS * 2, 3, 4), (1, 0, 2)), 0),
    ],
)
def test_split_physical_blocks_belong_to_their_block(view: Strided, dim: int) -> None:
    layout = group_layout([Layer("layer", view, dim)], BLOCKS)
    for block in range(BLOCKS):
        found = bytes_of_segments(layout, block)
        assert len(found) == len(set(found))
        assert set(found) == bytes_of_block(view, dim, block, ratio=2)


def test_layers_that_lie_side_by_side_become_one_segment() -> None:
    inner = (4, 3)
    page = prod(inner) * 2
    views = [
        Strided(4096 + at * page, (BLOCKS, *inner), (3 * page, 6, 2), 2, Memory.HOST)
        for at in range(3)
    ]
    layers = [Layer(f"layer {at}", view) for at, view in enumerate(views)]
    layout = group_layout(layers, BLOCKS)
    (segment,) = layout.segments
    assert (segment.block_bytes, segment.block_stride) == (3 * page, 3 * page)
    # One after the other in memory, each with all its blocks, they stay apart.
    apart = [
        Layer(f"layer {at}", tensor((BLOCKS, *inner), address=4096 + at * BLOCKS * page))
        for at in range(3)
    ]
    assert len(group_layout(apart, BLOCKS).segments) == 3


def test_a_layer_that_shares_the_cache_of_another_is_saved_once() -> None:
    view = tensor((BLOCKS, 4, 3))
    shared = group_layout([Layer("one", view), Layer("sharing", view)], BLOCKS)
    assert shared.segments == group_layout([Layer("one", view)], BLOCKS).segments


def test_padding_between_blocks_is_not_saved() -> None:
    view = Strided(4096, (BLOCKS, 4, 3), (32, 6, 2), 2, Memory.HOST)
    (segment,) = group_layout([Layer("layer", view)], BLOCKS).segments
    assert (segment.block_bytes, segment.block_stride) == (24, 32)


def test_arrangements_of_the_same_sizes_have_different_fingerprints() -> None:
    views = {
        "NHD": (tensor((BLOCKS, 4, 3, 5)), 0),
        "HND": (tensor((BLOCKS, 4, 3, 5), (0, 2, 1, 3)), 0),
        "other extents": (tensor((BLOCKS, 3, 4, 5)), 0),
        "other elements": (tensor((BLOCKS, 4, 3, 10), size=1), 0),
        "split": (tensor((BLOCKS * 2, 2, 3, 5)), 0),
    }
    prints = {
        name: group_layout([Layer("layer", view, dim)], BLOCKS).fingerprint
        for name, (view, dim) in views.items()
    }
    assert len(set(prints.values())) == len(prints), prints
    again = group_layout([Layer("other name", tensor((BLOCKS, 4, 3, 5), address=8192))], BLOCKS)
    assert again.fingerprint == prints["NHD"]


def test_stages_of_a_pipeline_with_different_numbers_of_layers_describe_themselves_alike() -> None:
    layers = [
        Layer(f"layer {at}", tensor((BLOCKS, 4, 3), address=4096 * (at + 1))) for at in range(3)
    ]
    one, other = group_layout(layers[:1], BLOCKS), group_layout(layers[1:], BLOCKS)
    assert one.fingerprint != other.fingerprint
    assert one.of_any_stage == other.of_any_stage
    turned = group_layout([Layer("turned", tensor((BLOCKS, 4, 3), (0, 2, 1)))], BLOCKS)
    assert turned.of_any_stage != one.of_any_stage


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([], "without layers"),
        ([Layer("l", tensor((5, 4)))], "no whole number of physical blocks"),
        ([Layer("l", tensor((BLOCKS, 4)), 2)], "no dimension 2"),
        ([Layer("l", Strided(4096, (BLOCKS, 4), (4, 2), 2, Memory.HOST))], "overlaps"),
        ([Layer("l", Strided(4096, (BLOCKS, 0), (4, 2), 2, Memory.HOST))], "no bytes"),
        ([Layer("l", object())], "no tensor"),
    ],
)
def test_what_cannot_be_described_is_refused_with_the_reason(layers: list[Layer], why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        group_layout(layers, BLOCKS)
