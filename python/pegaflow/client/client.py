"""A connection to the node's daemon that mends itself."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from pegaflow.client import _abi
from pegaflow.client._gate import Gate
from pegaflow.client._library import library, text
from pegaflow.client._lists import U32, U64, Bitmap, fits
from pegaflow.client.completion import Completion, Limits, Stats, completion_of
from pegaflow.client.constants import SCHEDULER, LogLevel, Mode, Op, State, Status
from pegaflow.client.errors import ClosedError
from pegaflow.client.memory import Group, HostMemory
from pegaflow.client.registration import Registration
from pegaflow.client.spec import Log, Namespace, Options, Order, registration_to_c

_logger = logging.getLogger("pegaflow.client")

#: A wait in the library is cut into pieces of this length, so that Ctrl-C and `close` are heard.
_PIECE_MS = 50

#: The library's default of `Options.control_timeout_ms`, the longest that any call may take.
_CONTROL_MS = 30_000

_TIMEOUT = frozenset({Status.TIMEOUT})

#: What pega_wait_ready says only once its time has run out: see pegaflow.h.
_MAY_PASS = frozenset({Status.TIMEOUT, Status.ALREADY_REGISTERED, Status.LIMIT})

#: Completions that one call of the library hands out, at most.
_BATCH = 64


class Client:
    """A client of the node's daemon. Any thread may call anything at any time.

    No call waits without a bound. Use it as a context manager, or call `close`.
    """

    def __init__(self, options: Options | None = None) -> None:
        """Connects; see `Options`.

        Raises NoDaemonError (nobody listens, or autostart failed), VersionMismatchError,
        PermissionDeniedError, LimitError, DrainingError, TimeoutError, ProtocolError,
        InvalidArgumentError, SystemCallError; LibraryError where libpegaflow.so is missing.
        """
        options = options or Options()
        self._library = library()
        self._pid = os.getpid()
        self._bitmaps: dict[int, Bitmap] = {}
        self._bitmaps_lock = threading.Lock()
        # The library calls this until pega_disconnect has returned: it lives as long as the client.
        self._log = _log_function(options.log or _log_to_logger)
        self._longest_call_s = (options.control_timeout_ms or _CONTROL_MS) / 1000 + 5
        handle = ctypes.c_void_p()
        self._library.check(
            self._library.pega_connect(ctypes.byref(options.to_c(self._log)), ctypes.byref(handle))
        )
        assert handle.value is not None
        self._gate = Gate(handle.value)
        _clients.add(self)

    # ------------------------------------------------------------ life

    @property
    def closed(self) -> bool:
        """`close` has been called."""
        return not self._gate.open

    def close(self) -> None:
        """Ends the session with its registrations and leases, and unmaps all memory of
        `alloc_host`. Calls that run in other threads end first; waits end with ClosedError.

        Wait for loads, or unregister, before: a load under way may still write for a moment.
        """
        try:
            handle = self._gate.shut(self._longest_call_s)
        except TimeoutError as error:
            _logger.warning("a client stays until the process ends: %s", error)
            return
        if handle is not None:
            self._library.pega_disconnect(handle)
            self._bitmaps.clear()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not there if connecting failed.
        gate: Gate | None = self.__dict__.get("_gate")
        if gate is not None and gate.open:
            if self._pid == os.getpid():
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            if getattr(_logging, "now", False):
                # The library's thread, which closing waits for.
                threading.Thread(target=self.close, name="pegaflow-close").start()
            else:
                self.close()

    def __repr__(self) -> str:
        return f"Client({'closed' if self.closed else self.state.name.lower()})"

    @property
    def state(self) -> State:
        """Whether a session is up. Costs one load of memory."""
        try:
            with self._gate as handle:
                return State(self._library.check(self._library.pega_state(handle)))
        except ClosedError:
            return State.CLOSED

    def stats(self) -> Stats:
        """The counters. Never blocks."""
        c = _abi.pega_stats(size=ctypes.sizeof(_abi.pega_stats))
        with self._gate as handle:
            self._library.check(self._library.pega_get_stats(handle, ctypes.byref(c)))
        names = [name for name, *_ in _abi.pega_stats._fields_[2:]]
        return Stats(State(c.state), *(getattr(c, name) for name in names))

    def limits(self) -> Limits:
        """The longest lists that can be submitted. Never blocks."""
        c = _abi.pega_limits(size=ctypes.sizeof(_abi.pega_limits))
        with self._gate as handle:
            self._library.check(self._library.pega_get_limits(handle, ctypes.byref(c)))
        names = [name for name, *_ in _abi.pega_limits._fields_[2:]]
        return Limits(*(getattr(c, name) for name in names))

    # ------------------------------------------------------------ memory and registrations

    def alloc_host(self, nbytes: int) -> HostMemory:
        """Allocates KV memory that the daemon maps too, so that copies need no system call.

        It stays valid until it is freed or the client closed. Raises SystemCallError (no memory),
        TimeoutError, LimitError, DisconnectedError.
        """
        if not 0 < nbytes < 1 << 63:
            raise ValueError(f"{nbytes} bytes of memory")
        memory = ctypes.c_void_p()
        with self._gate as handle:
            self._library.check(self._library.pega_alloc_host(handle, nbytes, ctypes.byref(memory)))
        assert memory.value is not None
        return HostMemory(self, memory.value, nbytes)

    def _free_host(self, address: int) -> None:
        with self._gate as handle:
            self._library.check(self._library.pega_free_host(handle, address))

    def register_worker(
        self,
        instance: str,
        namespace: Namespace,
        groups: Sequence[Group],
        *,
        rank: int = 0,
        world_size: int = 1,
        mode: Mode = Mode.READ_WRITE,
    ) -> Registration:
        """Registers a rank of an instance with its KV memory, all groups at once.

        The memory must stay where it is until `Registration.unregister`. Raises BadLayoutError,
        InvalidArgumentError, AlreadyRegisteredError, NamespaceMismatchError, LimitError,
        PermissionDeniedError, DeviceUnavailableError, VersionMismatchError, SystemCallError,
        DisconnectedError, TimeoutError.
        """
        return self._register(instance, namespace, groups, rank, world_size, mode)

    def register_scheduler(
        self,
        instance: str,
        namespace: Namespace,
        *,
        world_size: int = 1,
        mode: Mode = Mode.READ_WRITE,
    ) -> Registration:
        """Registers a process without KV memory, which probes and queries. See `register_worker`;
        `world_size` counts the worker ranks."""
        return self._register(instance, namespace, (), SCHEDULER, world_size, mode)

    def _register(
        self,
        instance: str,
        namespace: Namespace,
        groups: Sequence[Group],
        rank: int,
        world_size: int,
        mode: Mode,
    ) -> Registration:
        spec = registration_to_c(instance, namespace, world_size, rank, mode, groups)
        number = ctypes.c_uint32()
        with self._gate as handle:
            self._library.check(
                self._library.pega_register(handle, ctypes.byref(spec), ctypes.byref(number))
            )
        return Registration(self, number.value, groups)

    def _wait_ready(self, registration: int, timeout_ms: int) -> None:
        def attempt(handle: int, piece_ms: int) -> int:
            return int(self._library.pega_wait_ready(handle, registration, piece_ms))

        self._in_pieces(timeout_ms, attempt, _MAY_PASS)

    # ------------------------------------------------------------ requests

    def cancel(self, request: int) -> int:
        """Asks to cancel an unfinished load or save. Both requests complete.

        Raises UnknownRequestError if it is finished already.
        """
        return self._submit(self._library.pega_cancel, fits("request", request, U64))

    def nop(self) -> int:
        """Does nothing, there and back: is the daemon alive?"""
        return self._submit(self._library.pega_nop)

    def _submit(self, call: Any, *arguments: Any, bitmap: Bitmap | None = None) -> int:
        """Makes a call of the library that ends in a request. `bitmap` is what the library will
        write for it: noted also where Ctrl-C comes as the call returns."""
        request = ctypes.c_uint64()
        try:
            with self._gate as handle:
                self._library.check(call(handle, *arguments, ctypes.byref(request)))
        finally:
            if bitmap is not None and request.value:
                self._bitmaps[request.value] = bitmap
        return request.value

    def stream_wait(self, request: int, steps: int, stream: Any) -> None:
        """What a stream (a `torch.cuda.Stream`, or the handle of one; 0: the default stream) gets
        from now on comes after the first `steps` steps of a load with `steps`. No thread waits.

        The stream goes on, too, when the load fails or its daemon is gone: only the completion says
        that the bytes are there. Look at it before the results of the work behind this are used.

        Raises UnknownRequestError if the load was consumed, what its status stands for if it has
        failed, DeviceUnavailableError where streams cannot be told of it (then `wait` for it), and
        InvalidArgumentError for more steps than the load has or a stream that is being captured.
        """
        fits("request", request, U64)
        fits("steps", steps, U32)
        order = Order.stream(stream)
        with self._gate as handle:
            self._library.check(
                self._library.pega_stream_wait(
                    handle, request, steps, fits("stream", order.handle, U64) or None
                )
            )

    # ------------------------------------------------------------ completions

    def wait(self, request: int, timeout_ms: int) -> Completion:
        """Waits for one request. The completion's status is not looked at: see `check`.

        Raises TimeoutError if it is not finished (0 only looks; the request goes on), and
        UnknownRequestError if its completion was consumed.
        """
        c = _abi.pega_completion()
        fits("request", request, U64)

        def attempt(handle: int, piece_ms: int) -> int:
            return int(self._library.pega_wait(handle, request, piece_ms, ctypes.byref(c)))

        self._in_pieces(timeout_ms, attempt)
        return self._completion(c)

    def poll(self, capacity: int | None = None) -> list[Completion]:
        """Finished requests that no thread waits for, oldest first: all there are, or `capacity` at
        most. Never blocks.

        Without `capacity` it returns only once the descriptor tells of what comes next.
        """
        found: list[Completion] = []
        room = _BATCH if capacity is None else min(capacity, _BATCH)
        buffer = (_abi.pega_completion * max(room, 1))()
        while capacity is None or len(found) < capacity:
            most = room if capacity is None else min(room, capacity - len(found))
            with self._gate as handle:
                count = self._library.check(self._library.pega_poll(handle, buffer, most))
            if count == 0:
                break
            found.extend(self._completion(buffer[at]) for at in range(count))
        return found

    def unloaded_blocks(self, request: int) -> list[int]:
        """The blocks that a failed load left undefined: recompute them. May be asked again.

        Raises UnknownRequestError: no load, not failed, or forgotten.
        """
        fits("request", request, U64)
        count = ctypes.c_size_t()
        room = 0
        while True:
            blocks = (ctypes.c_uint32 * max(room, 1))()
            with self._gate as handle:
                self._library.check(
                    self._library.pega_unloaded_blocks(
                        handle, request, ctypes.addressof(blocks), room, ctypes.byref(count)
                    )
                )
            if count.value <= room:
                return blocks[: count.value]
            room = count.value

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` has to be called: for select, epoll, asyncio.
        Do not read or close it. Poll until nothing comes, then sleep on it."""
        with self._gate as handle:
            return self._library.check(self._library.pega_completion_fd(handle))

    def _completion(self, c: _abi.pega_completion) -> Completion:
        bitmap = None
        if c.op == Op.QUERY:
            with self._bitmaps_lock:
                bitmap = self._bitmaps.pop(c.request, None)
        return completion_of(c, bitmap, self._library)

    def _in_pieces(
        self,
        timeout_ms: int,
        attempt: Callable[[int, int], int],
        may_pass: frozenset[Status] = _TIMEOUT,
    ) -> None:
        """Calls until the answer is none that time may change, or `timeout_ms` have gone by."""
        if timeout_ms < 0:
            raise ValueError(f"timeout_ms {timeout_ms} is negative")
        end = time.monotonic_ns() + timeout_ms * 1_000_000
        piece = min(timeout_ms, _PIECE_MS)
        while True:
            with self._gate as handle:
                result = attempt(handle, piece)
                error = self._library.error(-result) if result < 0 else None
            if error is None:
                return
            left = max(0, -((time.monotonic_ns() - end) // 1_000_000))
            if error.status not in may_pass or not left:
                raise error
            piece = min(left, _PIECE_MS)


def connect(options: Options | None = None, **named: Any) -> Client:
    """A client of the node's daemon: `connect(node="a", autostart=True)` is
    `Client(Options(node="a", autostart=True))`."""
    if options is not None and named:
        raise TypeError("either Options or options by name")
    return Client(options or Options(**named))


def _log_to_logger(level: LogLevel, line: str) -> None:
    _logger.log(logging.WARNING if level == LogLevel.WARN else logging.INFO, "%s", line)


#: `now` is true while the thread is the library's, in a callback.
_logging = threading.local()


def _log_function(log: Log) -> Any:
    def call(_user: object, level: int, line: bytes | None) -> None:
        _logging.now = True
        # Nothing may pass through the library's frames.
        try:
            log(LogLevel(level), text(line))
        except Exception:
            _logger.exception("the log callback failed on: %s", text(line))
        finally:
            _logging.now = False

    return _abi.LOG_FUNCTION(call)


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # The library's thread calls Python for its lines, which it cannot once the interpreter ends.
    for client in list(_clients):
        client.close()


def _after_fork() -> None:
    # A thread that held these locks does not exist in the child. The client itself is the parent's:
    # the library refuses calls on it, and closing frees the copy alone.
    for client in list(_clients):
        client._gate = client._gate.after_fork()
        client._bitmaps_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
