"""Numbers of pegaflow.h by name. A number that only a newer library knows keeps its value."""

from __future__ import annotations

from enum import IntEnum


class _Open(IntEnum):
    """An enumeration that takes numbers without a name of their own, as `UNKNOWN_77`."""

    @classmethod
    def _missing_(cls, value: object) -> _Open | None:
        if not isinstance(value, int) or value < 0:
            return None
        member = int.__new__(cls, value)
        member._name_ = f"UNKNOWN_{value}"
        member._value_ = value
        return member


class Status(_Open):
    """What became of a call or a request; `docs/c-api.md` says what to do about each."""

    OK = 0
    LOADING = 1
    INVALID_ARGUMENT = 2
    NOT_READY = 3
    UNKNOWN_REGISTRATION = 4
    UNKNOWN_GROUP = 5
    UNKNOWN_LEASE = 6
    LEASE_EXPIRED = 7
    LEASE_CONSUMED = 8
    BLOCK_OUT_OF_RANGE = 9
    DUPLICATE_BLOCK = 10
    TOO_MANY = 11
    NO_SPACE = 12
    SAVE_ONLY = 13
    NO_MEMORY = 14
    COPY_FAILED = 15
    CANCELLED = 16
    DRAINING = 17
    DISCONNECTED = 18
    TIMEOUT = 19
    AGAIN = 20
    VERSION_MISMATCH = 21
    PERMISSION_DENIED = 22
    BAD_LAYOUT = 23
    ALREADY_REGISTERED = 24
    NAMESPACE_MISMATCH = 25
    PROTOCOL_ERROR = 26
    SYSTEM_ERROR = 27
    INTERNAL = 28
    NO_DAEMON = 29
    LIMIT = 30
    UNKNOWN_REQUEST = 31
    DEVICE_UNAVAILABLE = 32


class Op(_Open):
    """What a completion answers."""

    NOP = 1
    QUERY = 2
    LOAD = 3
    SAVE = 4
    RELEASE = 5
    RENEW = 6
    CANCEL = 7


class Reason(_Open):
    """Why the first position of a query that is not a hit is none."""

    NONE = 0
    ABSENT = 1
    INCOMPLETE = 2
    IN_FLIGHT = 3
    AFTER_MISS = 4
    NO_LEASE = 5
    DISCONNECTED = 6


class State(_Open):
    """Whether a client has a session with a daemon."""

    CONNECTED = 1
    DISCONNECTED = 2
    CLOSED = 3


class Mode(IntEnum):
    """What a registration may do; the same for all ranks of an instance."""

    READ_WRITE = 0
    SAVE_ONLY = 1


class Memory(IntEnum):
    """What kind of memory a segment lies in."""

    AUTO = 0
    HOST = 1
    CUDA = 2


class OrderKind(IntEnum):
    """What a save or load of GPU memory comes after."""

    NONE = 0
    STREAM = 1
    EVENT = 2


class Fetch(IntEnum):
    """What a query does about blocks that are in a tier below the daemon's pool."""

    #: They are fetched, and the query completes at once, as `LOADING` until they are in.
    POLL = 0
    #: They are left where they are.
    NEVER = 1
    #: They are fetched, and the query completes when they are in.
    WAIT = 2


class LogLevel(_Open):
    """How much the library says, and the level of one line."""

    OFF = 1
    WARN = 2
    INFO = 3


#: The rank of a process without KV memory that only probes and queries.
SCHEDULER = -1
