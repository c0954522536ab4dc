"""Answers: of one request, of the counters, of the limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegaflow.client import _abi
from pegaflow.client._lists import Bitmap
from pegaflow.client.constants import Op, Reason, State, Status
from pegaflow.client.errors import error_of

if TYPE_CHECKING:
    from pegaflow.client._library import Library


@dataclass(frozen=True)
class Completion:
    """The answer to one request. Fields without a meaning for an operation are 0."""

    op: Op
    status: Status
    #: Query: why the first position that is not a hit is none.
    reason: Reason
    request: int
    #: Query: the lease, 0 without a hit. Load, release, renew: as named.
    lease: int
    #: Query: hits. Load: blocks loaded. Save: blocks newly stored.
    count: int
    #: Save: already held or on their way in; not copied again.
    skipped: int
    #: Save: not stored: no room, or the copy failed. Load: copy failed.
    dropped: int
    #: Bytes copied.
    bytes: int
    #: What an error is about; query, renew: time to live in ms.
    value: int
    #: Time between the daemon seeing the request and its answer.
    daemon_ns: int
    #: Query of another group than 0: which positions are hits.
    bitmap: Bitmap | None
    #: A sentence on `status`.
    text: str

    @property
    def ok(self) -> bool:
        """The request succeeded."""
        return self.status == Status.OK

    def check(self) -> Completion:
        """This completion, or the exception that its status stands for."""
        if not self.ok:
            what = f"{self.text} ({self.op.name.lower()} {self.request}, value {self.value})"
            raise error_of(self.status, what)
        return self


def completion_of(c: _abi.pega_completion, bitmap: Bitmap | None, library: Library) -> Completion:
    """A copy of what the library wrote."""
    status = Status(c.status)
    return Completion(
        Op(c.op),
        status,
        Reason(c.reason),
        c.request,
        c.lease,
        c.count,
        c.skipped,
        c.dropped,
        c.bytes,
        c.value,
        c.daemon_ns,
        bitmap,
        library.status_text(status) if c.status else "",
    )


@dataclass(frozen=True)
class Stats:
    """Counters of a client since it connected first."""

    state: State
    #: Requests accepted.
    submitted: int
    #: Completions, consumed or not.
    completed: int
    #: Those with another status than OK.
    failed: int
    #: Submissions refused with AGAIN.
    again: int
    #: Probes answered.
    probes: int
    #: Blocks that probes asked about.
    probed_blocks: int
    #: Blocks that probes found.
    probe_hits: int
    #: Bytes copied by loads.
    loaded_bytes: int
    #: Bytes copied by saves.
    saved_bytes: int
    #: Sessions lost.
    disconnects: int
    #: Sessions regained; the first one does not count.
    reconnects: int
    #: Requests not yet consumed at this moment.
    outstanding: int
    #: Time without a session so far.
    away_ms: int
    #: Attempts to get a session that failed.
    failed_attempts: int
    #: Registrations that the daemon refuses at this moment.
    refused_registrations: int
    #: Saves and loads that waited in the call: see `Order`.
    waited_orders: int


@dataclass(frozen=True)
class Limits:
    """Longest lists that a client can submit at all."""

    #: In one query of group 0.
    query_hashes: int
    #: In one query of another group.
    membership_hashes: int
    #: In one save.
    save_blocks: int
    #: In one load.
    load_blocks: int
    #: Requests not yet consumed.
    requests: int
