"""Exceptions: one class for each status, so that a caller catches what it can act on."""

from __future__ import annotations

import builtins

from pegaflow.client.constants import Status


class PegaError(Exception):
    """Whatever goes wrong with PegaFlow."""


class LibraryError(PegaError, OSError):
    """libpegaflow.so was not found, cannot be loaded, or is too old for this package."""


class ClosedError(PegaError):
    """The client, its registration or its memory has been closed."""


class StatusError(PegaError):
    """A call failed, or a request completed with another status than OK.

    `status` is the code, `text` what the library says about it: the thing, its value, the way out.
    """

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(f"{status.name.lower()}: {text}" if text else status.name.lower())
        self.status = status
        self.text = text

    def __reduce__(self) -> tuple[type[StatusError], tuple[Status, str]]:
        return type(self), (self.status, self.text)


class InvalidArgumentError(StatusError, ValueError):
    """An argument is malformed."""


class LoadingError(StatusError):
    """Blocks are coming up from a slower tier: query again."""


class NotReadyError(StatusError):
    """Not all ranks of the instance have registered yet."""


class UnknownRegistrationError(StatusError):
    """No such registration."""


class UnknownGroupError(StatusError):
    """The registration has no such cache group."""


class LeaseError(StatusError):
    """The lease is over, or was never given."""


class UnknownLeaseError(LeaseError):
    """The lease was consumed, released, or never given here."""


class LeaseExpiredError(LeaseError):
    """The lease ran past its time to live."""


class LeaseConsumedError(LeaseError):
    """This worker has already loaded from the lease."""


class BlockOutOfRangeError(StatusError, ValueError):
    """A block id is not below the group's number of blocks."""


class DuplicateBlockError(StatusError, ValueError):
    """A block id occurs twice in one load."""


class TooManyError(StatusError, ValueError):
    """The list is longer than `Client.limits()` allows: split it."""


class NoSpaceError(StatusError):
    """The pool is full of leased or unfinished blocks."""


class SaveOnlyError(StatusError):
    """The registration is save-only: it cannot query or load."""


class NoMemoryError(StatusError):
    """The registration has no KV memory: it cannot save or load."""


class CopyFailedError(StatusError):
    """A copy of KV memory failed."""


class CancelledError(StatusError):
    """The request was cancelled; no copy of it runs any more."""


class DrainingError(StatusError):
    """The daemon is about to stop and takes no new work."""


class DisconnectedError(StatusError, ConnectionError):
    """The daemon is away; the library reconnects by itself."""


class TimeoutError(StatusError, builtins.TimeoutError):  # noqa: A001 (pegaflow.client.TimeoutError)
    """The bound for waiting ran out. A request goes on and can be waited for again."""


class AgainError(StatusError):
    """No room now: consume completions, then submit again."""


class VersionMismatchError(StatusError):
    """Library and daemon have no common protocol version."""


class PermissionDeniedError(StatusError, PermissionError):
    """The daemon does not serve this user, or this model to it."""


class BadLayoutError(StatusError, ValueError):
    """The KV layout is impossible."""


class AlreadyRegisteredError(StatusError):
    """A live session already holds this rank of the instance."""


class NamespaceMismatchError(StatusError):
    """Ranks of the instance differ in namespace, world size or mode."""


class ProtocolError(StatusError):
    """The other side broke the protocol; the session is over."""


class SystemCallError(StatusError):
    """A call of the system or of the CUDA driver failed."""


class InternalError(StatusError):
    """A defect in PegaFlow: please report it with the log."""


class NoDaemonError(StatusError, ConnectionError):
    """Nobody listens: start pegaflowd, or connect with `autostart` or `start_without_daemon`."""


class LimitError(StatusError):
    """A maximum of the daemon is reached."""


class UnknownRequestError(StatusError):
    """No such request, or its completion was consumed."""


class DeviceUnavailableError(StatusError):
    """The daemon cannot use this GPU."""


_CLASSES: dict[Status, type[StatusError]] = {
    Status.LOADING: LoadingError,
    Status.INVALID_ARGUMENT: InvalidArgumentError,
    Status.NOT_READY: NotReadyError,
    Status.UNKNOWN_REGISTRATION: UnknownRegistrationError,
    Status.UNKNOWN_GROUP: UnknownGroupError,
    Status.UNKNOWN_LEASE: UnknownLeaseError,
    Status.LEASE_EXPIRED: LeaseExpiredError,
    Status.LEASE_CONSUMED: LeaseConsumedError,
    Status.BLOCK_OUT_OF_RANGE: BlockOutOfRangeError,
    Status.DUPLICATE_BLOCK: DuplicateBlockError,
    Status.TOO_MANY: TooManyError,
    Status.NO_SPACE: NoSpaceError,
    Status.SAVE_ONLY: SaveOnlyError,
    Status.NO_MEMORY: NoMemoryError,
    Status.COPY_FAILED: CopyFailedError,
    Status.CANCELLED: CancelledError,
    Status.DRAINING: DrainingError,
    Status.DISCONNECTED: DisconnectedError,
    Status.TIMEOUT: TimeoutError,
    Status.AGAIN: AgainError,
    Status.VERSION_MISMATCH: VersionMismatchError,
    Status.PERMISSION_DENIED: PermissionDeniedError,
    Status.BAD_LAYOUT: BadLayoutError,
    Status.ALREADY_REGISTERED: AlreadyRegisteredError,
    Status.NAMESPACE_MISMATCH: NamespaceMismatchError,
    Status.PROTOCOL_ERROR: ProtocolError,
    Status.SYSTEM_ERROR: SystemCallError,
    Status.INTERNAL: InternalError,
    Status.NO_DAEMON: NoDaemonError,
    Status.LIMIT: LimitError,
    Status.UNKNOWN_REQUEST: UnknownRequestError,
    Status.DEVICE_UNAVAILABLE: DeviceUnavailableError,
}


def error_of(status: Status, text: str) -> StatusError:
    """The exception for a status; `StatusError` itself for one that only a newer library knows."""
    return _CLASSES.get(status, StatusError)(status, text)
