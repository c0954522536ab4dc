"""What a caller says about itself: how to connect, whose blocks it shares, and after what."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pegaflow.client import _abi
from pegaflow.client._lists import I32, U16, U32, U64, fits
from pegaflow.client.constants import SCHEDULER, LogLevel, Mode, OrderKind
from pegaflow.client.memory import Group

#: Takes a line about a change of the connection. The library's own thread calls it: it must return
#: soon, and must not close the client, register, allocate or wait on it.
Log = Callable[[LogLevel, str], None]

_DEFAULT, _ON, _OFF = 0, 1, 2


def _switch(value: bool | None) -> int:
    return _DEFAULT if value is None else _ON if value else _OFF


def encode(name: str, value: str | None) -> bytes | None:
    """A text argument; None stays "not given". Raises ValueError for a zero byte inside."""
    if value is None:
        return None
    if "\0" in value:
        raise ValueError(f"{name} contains a zero character: {value!r}")
    return value.encode()


@dataclass(frozen=True)
class Options:
    """How to connect. None and 0 take the default that `pegaflow.h` names."""

    #: Node name [$PEGAFLOW_NODE, else "default"].
    node: str | None = None
    #: The daemon's socket [$PEGAFLOW_SOCKET, else by node name].
    socket: str | None = None
    #: Name in the daemon's tables [program and pid].
    client_name: str | None = None
    #: Start a daemon if none listens [on if PEGAFLOW_AUTOSTART=1].
    autostart: bool | None = None
    #: Program for autostart [$PEGAFLOW_DAEMON, else the one that came with the package].
    daemon: str | None = None
    #: Begin disconnected where no daemon answers [on if PEGAFLOW_START_WITHOUT_DAEMON=1].
    start_without_daemon: bool | None = None
    #: Reconnect and register again when the daemon was away [on].
    reconnect: bool | None = None
    #: Bound of connecting, autostart included [5000].
    connect_timeout_ms: int = 0
    #: Bound of registering, unregistering and allocating [30000].
    control_timeout_ms: int = 0
    #: Submission ring; a power of two, 16 to 32768 [256].
    ring_slots: int = 0
    #: Most requests not consumed; a power of two, 16 to 32768 [256].
    completion_slots: int = 0
    #: Room for lists under way; a multiple of 16 KiB [4 MiB].
    arena_bytes: int = 0
    #: How long `Client.wait` spins before it sleeps [40000].
    spin_ns: int = 0
    #: False: sleep at once [on].
    spin: bool = True
    #: How much is said [$PEGAFLOW_CLIENT_LOG=off|warn|info, else warn].
    log_level: LogLevel | None = None
    #: Takes the lines [the logger "pegaflow.client"].
    log: Log | None = None

    def to_c(self, log: Any) -> _abi.pega_options:
        """As the library takes them; `log` is the C function for the lines."""
        return _abi.pega_options(
            size=ctypes.sizeof(_abi.pega_options),
            ring_slots=fits("ring_slots", self.ring_slots, U32),
            node=encode("node", self.node),
            socket=encode("socket", self.socket),
            client_name=encode("client_name", self.client_name),
            daemon=encode("daemon", self.daemon),
            arena_bytes=fits("arena_bytes", self.arena_bytes, U64),
            connect_timeout_ms=fits("connect_timeout_ms", self.connect_timeout_ms, U64),
            control_timeout_ms=fits("control_timeout_ms", self.control_timeout_ms, U64),
            spin_ns=fits("spin_ns", self.spin_ns, U64),
            completion_slots=fits("completion_slots", self.completion_slots, U32),
            autostart=_switch(self.autostart),
            reconnect=_switch(self.reconnect),
            no_spin=_DEFAULT if self.spin else _ON,
            start_without_daemon=_switch(self.start_without_daemon),
            log_level=0 if self.log_level is None else int(self.log_level),
            log=log,
        )


@dataclass(frozen=True)
class Namespace:
    """The domain in which a hash names one run of bytes. Engines share blocks only if all of this
    and the sizes of their segments are equal."""

    #: Tokens in a block.
    block_tokens: int
    #: Model name or path.
    model: str
    #: Element type, such as "bfloat16".
    dtype: str
    #: Algorithm, seed and input of the hashes.
    hash_algorithm: str
    #: Revision, LoRA set, quantisation: what changes KV values.
    revision: str | None = None
    #: Layout of a block inside its segments, such as "NHD".
    kv_layout: str | None = None
    #: Parallel topology beyond the world size, such as "tp4pp2".
    topology: str | None = None
    #: Tenant or cache salt.
    salt: str | None = None

    def to_c(self) -> _abi.pega_namespace:
        """As the library takes it."""
        return _abi.pega_namespace(
            size=ctypes.sizeof(_abi.pega_namespace),
            block_tokens=fits("block_tokens", self.block_tokens, U32),
            model=encode("model", self.model),
            revision=encode("revision", self.revision),
            dtype=encode("dtype", self.dtype),
            kv_layout=encode("kv_layout", self.kv_layout),
            topology=encode("topology", self.topology),
            hash_algorithm=encode("hash_algorithm", self.hash_algorithm),
            salt=encode("salt", self.salt),
        )


@dataclass(frozen=True)
class Order:
    """What a save or load of GPU memory comes after. The call does not wait for it."""

    kind: OrderKind
    #: cudaStream_t or CUstream (0: default stream), cudaEvent_t or CUevent.
    handle: int

    @classmethod
    def stream(cls, stream: Any) -> Order:
        """After all that a stream has now: a `torch.cuda.Stream`, or the handle of one."""
        return cls(OrderKind.STREAM, int(getattr(stream, "cuda_stream", stream)))

    @classmethod
    def event(cls, event: Any) -> Order:
        """After an event as it was recorded last: a `torch.cuda.Event`, or the handle of one."""
        return cls(OrderKind.EVENT, int(getattr(event, "cuda_event", event)))

    def to_c(self) -> _abi.pega_order:
        """As the library takes it."""
        return _abi.pega_order(
            ctypes.sizeof(_abi.pega_order), int(self.kind), fits("handle", self.handle, U64) or None
        )


def registration_to_c(
    instance: str,
    namespace: Namespace,
    world_size: int,
    rank: int,
    mode: Mode,
    groups: Sequence[Group],
) -> _abi.pega_registration:
    """As the library takes it. The struct keeps what it points to."""
    c_groups = (_abi.pega_group * max(1, len(groups)))()
    for c_group, group in zip(c_groups, groups, strict=False):
        c_segments = (_abi.pega_segment * max(1, len(group.segments)))(
            *(
                _abi.pega_segment(
                    ctypes.sizeof(_abi.pega_segment),
                    int(one.memory),
                    fits("address", one.address, U64),
                    fits("block_stride", one.block_stride, U64),
                    fits("block_bytes", one.block_bytes, U64),
                )
                for one in group.segments
            )
        )
        c_group.size = ctypes.sizeof(_abi.pega_group)
        c_group.group = fits("group", group.group, U16)
        c_group.num_blocks = fits("num_blocks", group.num_blocks, U32)
        c_group.num_segments = len(group.segments)
        c_group.segments = c_segments
        c_group.replicated = _ON if group.replicated else _DEFAULT
    spec = _abi.pega_registration(
        size=ctypes.sizeof(_abi.pega_registration),
        world_size=fits("world_size", world_size, U32),
        rank=rank if rank == SCHEDULER else fits("rank", rank, I32),
        mode=int(mode),
        instance=encode("instance", instance),
        num_groups=len(groups),
    )
    spec.ns = ctypes.pointer(namespace.to_c())
    spec.groups = ctypes.cast(c_groups, ctypes.POINTER(_abi.pega_group)) if groups else None
    return spec
