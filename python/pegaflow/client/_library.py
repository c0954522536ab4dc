"""Finds, loads and checks libpegaflow.so, once per process."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from pegaflow.client import _abi
from pegaflow.client.constants import Status
from pegaflow.client.errors import LibraryError, StatusError, error_of

#: The file that a wheel carries, with pegaflowd and pegactl beside it.
BUNDLED = Path(__file__).resolve().parent.parent / "_native" / "libpegaflow.so.0"

# What returns at once without a system call. Giving the GIL up for these would cost more than the
# call itself, and a busy interpreter would let the thread wait for its turn.
_QUICK = frozenset(
    {
        "pega_version",
        "pega_abi_version",
        "pega_last_error",
        "pega_status_label",
        "pega_status_text",
        "pega_reason_label",
        "pega_op_label",
        "pega_options_init",
        "pega_state",
    }
)


class Library:
    """The functions of one libpegaflow.so: attributes by the names of the header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # The same file under the same handle; only the second keeps the GIL during a call.
            slow, quick = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        except OSError as error:
            raise LibraryError(f"cannot load {path}: {error}") from error
        try:
            abi = quick.pega_abi_version
        except AttributeError:
            raise LibraryError(f"{path} is no PegaFlow library") from None
        abi.restype, abi.argtypes = ctypes.c_uint32, ()
        self.abi_version = int(abi())
        if self.abi_version < _abi.ABI_VERSION:
            raise LibraryError(
                f"{path} speaks ABI version {self.abi_version}, this package needs"
                f" {_abi.ABI_VERSION}: install the library of the package's version"
            )
        for name, (result, arguments) in _abi.PROTOTYPES.items():
            function = getattr(quick if name in _QUICK else slow, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not bound: names the defect, and tells mypy that functions exist.
        raise AttributeError(f"libpegaflow has no function {name!r} in this binding")

    @property
    def version(self) -> str:
        """Version of the library, such as "0.1.0"."""
        return text(self.pega_version())

    def check(self, result: int) -> int:
        """The result, or the exception that a negative one stands for. Call it in the thread of
        the failed call, before any other."""
        if result < 0:
            raise self.error(-result)
        return result

    def error(self, status: int) -> StatusError:
        """The exception for the failure that this thread's last call met."""
        return error_of(Status(status), text(self.pega_last_error()))

    def status_text(self, status: Status) -> str:
        """A sentence on a status."""
        return text(self.pega_status_text(int(status)))


def text(value: bytes | None) -> str:
    """A text of the library."""
    return "" if value is None else value.decode("utf-8", "replace")


def find() -> Path:
    """Where the library is: $PEGAFLOW_LIBRARY if set, else the file that came with the package."""
    named = os.environ.get("PEGAFLOW_LIBRARY")
    if named:
        path = Path(named)
        if not path.is_file():
            raise LibraryError(f"PEGAFLOW_LIBRARY names {named}, and there is no such file")
        return path
    if BUNDLED.is_file():
        return BUNDLED
    raise LibraryError(
        f"libpegaflow.so was not found: PEGAFLOW_LIBRARY is not set, and {BUNDLED} does not exist"
        " (this package was not installed from a wheel). Set PEGAFLOW_LIBRARY to the library,"
        " which `make lib` builds as target/dist/lib/libpegaflow.so.0"
    )


_lock = threading.Lock()
_loaded: Library | None = None


def library() -> Library:
    """The process's library; the first call loads it, a failed one may be tried again."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = Library(find())
        return _loaded
