"""Keeps a client alive while calls on it run: the library frees it in `pega_disconnect`."""

from __future__ import annotations

import threading

from pegaflow.client.errors import ClosedError


class Gate:
    """Counts the calls inside. `shut` lets no more in and waits until the last one has left."""

    __slots__ = ("_handle", "_inside", "_left", "_lock")

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle
        self._inside = 0
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)

    @property
    def open(self) -> bool:
        """Calls are let in."""
        return self._handle is not None

    def __enter__(self) -> int:
        with self._lock:
            if self._handle is None:
                raise ClosedError("this client is closed")
            self._inside += 1
            return self._handle

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._handle is None and not self._inside:
                self._left.notify_all()

    def shut(self, timeout_s: float) -> int | None:
        """The handle, for the one caller that is to free it; None for all others.

        Raises TimeoutError where calls are still inside after `timeout_s`: then nothing may be
        freed, ever. Each call is bounded, so that is only one that Ctrl-C hit on its way in or out.
        """
        with self._lock:
            handle, self._handle = self._handle, None
            if not self._left.wait_for(lambda: not self._inside, timeout_s):
                raise TimeoutError(f"{self._inside} calls are still inside after {timeout_s} s")
            return handle

    def after_fork(self) -> Gate:
        """A gate for the forked child, where the threads that may be inside do not exist."""
        fresh = Gate(0)
        fresh._handle = self._handle
        return fresh
