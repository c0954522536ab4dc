"""Where KV memory lies: segments and groups out of tensors, and memory that the daemon shares."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from pegaflow.client.constants import Memory
from pegaflow.client.errors import ClosedError

if TYPE_CHECKING:
    from pegaflow.client.client import Client

#: Segments of one group, at most.
MAX_SEGMENTS = 1024


_DEVICES = {"cpu": Memory.HOST, "cuda": Memory.CUDA}
_INTERFACES = {"__cuda_array_interface__": Memory.CUDA, "__array_interface__": Memory.HOST}


@dataclass(frozen=True)
class Strided:
    """Shape and strides of a tensor in memory, whoever made it."""

    address: int
    shape: tuple[int, ...]
    #: Bytes from one element to the next, for each dimension.
    strides: tuple[int, ...]
    itemsize: int
    memory: Memory


def strided(tensor: Any) -> Strided:
    """Looks at a torch tensor, a numpy array, anything with `__cuda_array_interface__` or
    `__array_interface__`, or a writable buffer. Neither torch nor numpy is imported.

    Raises TypeError for anything else, and for memory of a device other than CPU and CUDA.
    """
    if isinstance(tensor, Strided):
        return tensor
    if callable(getattr(tensor, "data_ptr", None)) and callable(getattr(tensor, "stride", None)):
        size = int(tensor.element_size())
        device = str(tensor.device.type)
        if device not in _DEVICES:
            raise TypeError(f"a tensor on device {device!r} cannot be KV memory: only cpu and cuda")
        return Strided(
            int(tensor.data_ptr()),
            tuple(int(extent) for extent in tensor.shape),
            tuple(int(stride) * size for stride in tensor.stride()),
            size,
            _DEVICES[device],
        )
    for name, memory in _INTERFACES.items():
        interface = getattr(tensor, name, None)
        if interface is not None:
            return _of_interface(interface, memory)
    try:
        view = memoryview(tensor)
    except TypeError:
        raise TypeError(
            f"{type(tensor).__name__} is no tensor: neither data_ptr() and stride(), nor an array"
            " interface, nor a buffer"
        ) from None
    if view.readonly:
        raise TypeError(f"a read-only {type(tensor).__name__} cannot be KV memory")
    address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0
    return Strided(address, view.shape or (), view.strides or (), view.itemsize, Memory.HOST)


def _of_interface(interface: dict[str, Any], memory: Memory) -> Strided:
    address, readonly = interface["data"]
    if readonly:
        raise TypeError("a read-only array cannot be KV memory")
    shape = tuple(int(extent) for extent in interface["shape"])
    kind = interface["typestr"]
    if kind[1] in "OU":
        raise TypeError(f"an array of type {kind} cannot be KV memory")
    itemsize = int(kind[2:])
    strides = interface.get("strides")
    if strides is None:
        strides = tuple(itemsize * prod(shape[at + 1 :]) for at in range(len(shape)))
    return Strided(int(address), shape, tuple(map(int, strides)), itemsize, memory)


@dataclass(frozen=True)
class Segment:
    """One strided array: block `b` has `block_bytes` bytes at `address + b * block_stride`."""

    address: int
    block_stride: int
    block_bytes: int
    memory: Memory = Memory.AUTO
    #: Whatever has to stay alive as long as the memory is registered, such as the tensor.
    owner: object = field(default=None, repr=False, compare=False)


def segments_of(tensor: Any, block_dim: int = 0) -> list[Segment]:
    """The segments of a tensor whose dimension `block_dim` counts the blocks.

    Dimensions of a block that lie in memory without a gap make one segment, whatever their order;
    each index of the others makes a segment of its own, in the order of the dimensions. So
    `[num_blocks, ...]` is one segment, and `[2, num_blocks, ...]` with `block_dim=1` two.

    Raises ValueError for overlapping elements, an empty tensor, or a block in too many places.
    """
    view = strided(tensor)
    rank = len(view.shape)
    if not -rank <= block_dim < rank:
        raise ValueError(f"block_dim {block_dim} of a tensor with {rank} dimensions")
    block_dim %= rank
    if 0 in view.shape:
        raise ValueError(f"a tensor of shape {list(view.shape)} has no bytes")
    # From the innermost on: what continues the run belongs to it, the rest lies apart.
    run = span = view.itemsize
    apart: list[int] = []
    wide = [dim for dim in range(rank) if view.shape[dim] > 1]
    for dim in sorted(wide, key=view.strides.__getitem__):
        stride = view.strides[dim]
        if stride < span:
            raise ValueError(
                f"dimension {dim} of a tensor of shape {list(view.shape)} and strides"
                f" {list(view.strides)} (bytes) overlaps others or runs backwards"
            )
        span += stride * (view.shape[dim] - 1)
        if dim == block_dim:
            continue
        if stride == run and not apart:
            run *= view.shape[dim]
        else:
            apart.append(dim)
    apart.sort()
    if (count := prod(view.shape[dim] for dim in apart)) > MAX_SEGMENTS:
        raise ValueError(
            f"a block of a tensor of shape {list(view.shape)} and strides {list(view.strides)}"
            f" (bytes) lies in {count} places, at most {MAX_SEGMENTS}"
        )
    stride = view.strides[block_dim] if view.shape[block_dim] > 1 else run
    offsets = [
        sum(index * view.strides[dim] for index, dim in zip(at, apart, strict=True))
        for at in product(*(range(view.shape[dim]) for dim in apart))
    ]
    return [Segment(view.address + offset, stride, run, view.memory, tensor) for offset in offsets]


@dataclass(frozen=True)
class Group:
    """KV memory of one cache group. A page is its segments' bytes one after the other."""

    #: In layer order.
    segments: Sequence[Segment]
    #: Block ids are `0 .. num_blocks - 1`.
    num_blocks: int
    #: 0 for full attention.
    group: int = 0
    #: All ranks hold the same bytes (MLA): stored once.
    replicated: bool = False

    @classmethod
    def of(
        cls,
        tensors: Any,
        *,
        block_dim: int = 0,
        group: int = 0,
        replicated: bool = False,
    ) -> Group:
        """The group of one tensor, or of several in layer order, all with the same blocks.

        Raises ValueError where they differ in the number of blocks; see also `segments_of`.
        """
        several = tensors if isinstance(tensors, (list, tuple)) else [tensors]
        return cls(
            [one for tensor in several for one in segments_of(tensor, block_dim)],
            _common(strided(tensor).shape[block_dim] for tensor in several),
            group,
            replicated,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in all segments."""
        return sum(segment.block_bytes for segment in self.segments)


def _common(counts: Iterable[int]) -> int:
    different = sorted(set(counts))
    if len(different) != 1:
        raise ValueError(f"tensors of one group have one number of blocks, not {different}")
    return different[0]


class HostMemory:
    """KV memory that the daemon maps too: zeroed, page-aligned. Made by `Client.alloc_host`.

    `numpy.asarray(memory)` and `memory.view()` are views of its bytes. Like any view of the memory
    they must not be used after `free()` or the end of the client, which unmap it.
    """

    def __init__(self, client: Client, address: int, nbytes: int) -> None:
        self._client = client
        self._address: int | None = address
        self.nbytes = nbytes

    @property
    def address(self) -> int:
        """Of its first byte."""
        if self._address is None or self._client.closed:
            raise ClosedError("this memory has been freed")
        return self._address

    def view(self, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """Its bytes, or part of them, to read and write."""
        size = self.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or size < 0 or offset + size > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + size} of {self.nbytes}")
        return memoryview((ctypes.c_ubyte * size).from_address(self.address + offset)).cast("B")

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "data": (self.address, False),
            "shape": (self.nbytes,),
            "typestr": "|u1",
        }

    def free(self) -> None:
        """Unmaps it; the end of the client does so as well. Nothing if it is done already.

        Raises InvalidArgumentError while a registration uses it.
        """
        if self._address is not None and not self._client.closed:
            self._client._free_host(self._address)
        self._address = None

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __repr__(self) -> str:
        where = "freed" if self._address is None else hex(self._address)
        return f"HostMemory({self.nbytes} bytes, {where})"
