"""Where the blocks of vLLM's KV cache lie, as segments.

A layer's tensor has its blocks in one dimension; the rest of a block lies in one run of bytes or in
several (keys and values apart, layers side by side). Kernels may split a block into several
*physical* blocks, which then are consecutive. What cannot be described is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pegaflow.client import Group, Segment, Strided, segments_of, strided


class LayoutError(ValueError):
    """A KV cache that cannot be described; the text says what and why."""


@dataclass(frozen=True)
class Layer:
    """One tensor of a group."""

    name: str
    tensor: Any
    #: The dimension that counts (physical) blocks.
    block_dim: int = 0


@dataclass(frozen=True)
class GroupLayout:
    """A group's memory, and a text that tells two arrangements of the same sizes apart."""

    segments: list[Segment]
    fingerprint: str
    #: The same without the number of layers, in which stages of a pipeline differ.
    of_any_stage: str


def _logical(layer: Layer, num_blocks: int) -> tuple[Strided, int, int]:
    """The tensor with one index per block of vLLM, its block dimension, and how many physical
    blocks each has."""
    view = strided(layer.tensor)
    if not 0 <= layer.block_dim < len(view.shape):
        raise LayoutError(
            f"{layer.name}: no dimension {layer.block_dim} in shape {list(view.shape)}"
        )
    physical = view.shape[layer.block_dim]
    if num_blocks <= 0 or physical % num_blocks:
        raise LayoutError(
            f"{layer.name}: dimension {layer.block_dim} of shape {list(view.shape)} counts no whole"
            f" number of physical blocks for each of {num_blocks} blocks"
        )
    ratio = physical // num_blocks
    if ratio == 1:
        return view, layer.block_dim, 1
    at, stride = layer.block_dim, view.strides[layer.block_dim]
    shape = (*view.shape[:at], num_blocks, ratio, *view.shape[at + 1 :])
    strides = (*view.strides[:at], ratio * stride, stride, *view.strides[at + 1 :])
    return Strided(view.address, shape, strides, view.itemsize, view.memory), at, ratio


def _order(view: Strided, block_dim: int) -> str:
    """The dimensions of a block from the outermost in memory to the innermost, with their extents:
    tells NHD from HND."""
    dims = [dim for dim in range(len(view.shape)) if dim != block_dim and view.shape[dim] > 1]
    dims.sort(key=lambda dim: -view.strides[dim])
    return ".".join(f"{dim - (dim > block_dim)}:{view.shape[dim]}" for dim in dims)


def group_layout(layers: Sequence[Layer], num_blocks: int) -> GroupLayout:
    """The segments of a group's layers in their order; neighbours in memory become one. A layer
    that shares the cache of an earlier one adds nothing.

    Raises LayoutError.
    """
    if not layers:
        raise LayoutError("a cache group without layers")
    segments: list[Segment] = []
    orders: list[str] = []
    seen: set[Strided] = set()
    for layer in layers:
        try:
            view, block_dim, ratio = _logical(layer, num_blocks)
            if view in seen:
                continue
            seen.add(view)
            parts = segments_of(view, block_dim)
        except (TypeError, ValueError) as error:
            raise LayoutError(f"{layer.name}: {error}") from None
        segments += [
            Segment(part.address, part.block_stride, part.block_bytes, part.memory, layer.tensor)
            for part in parts
        ]
        orders.append(f"{view.itemsize}x{_order(view, block_dim)}/{ratio}")
    return GroupLayout(_joined(segments), _shortened(orders), ",".join(sorted(set(orders))))


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours that lie side by side in every block are one segment: fewer, larger copies."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.block_stride == segment.block_stride
            and last.memory == segment.memory
            and last.address + last.block_bytes == segment.address
            and last.block_bytes + segment.block_bytes <= last.block_stride
        ):
            joined[-1] = Segment(
                last.address,
                last.block_stride,
                last.block_bytes + segment.block_bytes,
                last.memory,
                (last.owner, segment.owner),
            )
        else:
            joined.append(segment)
    return joined


def _shortened(orders: list[str]) -> str:
    """Equal neighbours as one with their number."""
    runs: list[tuple[str, int]] = []
    for order in orders:
        if runs and runs[-1][0] == order:
            runs[-1] = (order, runs[-1][1] + 1)
        else:
            runs.append((order, 1))
    return ",".join(f"{count}*{order}" for order, count in runs)


def to_group(layout: GroupLayout, number: int, num_blocks: int, *, replicated: bool) -> Group:
    """As the client registers it."""
    return Group(layout.segments, num_blocks, number, replicated)
