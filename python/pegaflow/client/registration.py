"""A rank with its KV memory, or a scheduler: what probes, queries, loads and saves go through."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from pegaflow.client import _abi
from pegaflow.client._lists import (
    U16,
    U32,
    U64,
    Bitmap,
    Blocks,
    Hashes,
    block_list,
    fits,
    hash_list,
)
from pegaflow.client.constants import Fetch
from pegaflow.client.errors import ClosedError
from pegaflow.client.memory import Group
from pegaflow.client.spec import Order

if TYPE_CHECKING:
    from pegaflow.client.client import Client


class Registration:
    """Made by `Client.register_worker` or `Client.register_scheduler`.

    It stays valid across reconnections. Requests return an id at once; its answer comes from
    `Client.wait` or `Client.poll`. Requests raise AgainError (consume completions first),
    TooManyError (split the list), and, except for queries, DisconnectedError and NotReadyError.
    """

    def __init__(self, client: Client, number: int, groups: Sequence[Group]) -> None:
        self._client = client
        self._library = client._library
        self._number: int | None = number
        # The memory has to stay mapped until the registration ends.
        self._groups = list(groups)

    @property
    def client(self) -> Client:
        """The client that it belongs to."""
        return self._client

    @property
    def id(self) -> int:
        """Its number; the same for the life of the client."""
        if self._number is None:
            raise ClosedError("this registration has ended")
        return self._number

    def wait_ready(self, timeout_ms: int) -> None:
        """Waits until every rank of the instance has registered: only then are there hits.

        Raises TimeoutError (0 only looks), or what the daemon has against the registration.
        """
        self._client._wait_ready(self.id, timeout_ms)

    def unregister(self) -> None:
        """Ends it once no copy touches its memory any more. Nothing if it has ended already.

        Raises TimeoutError while copies run or the daemon does not answer: it stays, call again.
        """
        if self._number is None or self._client.closed:
            self._number = None
            return
        with self._client._gate as handle:
            self._library.check(self._library.pega_unregister(handle, self._number))
        self._number = None
        self._groups.clear()

    # ------------------------------------------------------------ probes

    def probe(self, hashes: Hashes, *, group: int = 0) -> int:
        """How many of the hashes, from the first on, are cached without a gap.

        Reads shared memory. The answer is advice: only a query's lease holds the blocks.
        """
        words = hash_list(hashes)
        hits = ctypes.c_uint32()
        named = (self.id, _small(group), words.address, words.count)
        with self._client._gate as handle:
            self._library.check(self._library.pega_probe(handle, *named, ctypes.byref(hits)))
        return hits.value

    def probe_membership(self, hashes: Hashes, *, group: int = 0) -> Bitmap:
        """Which of the hashes are cached. Otherwise like `probe`."""
        words = hash_list(hashes)
        bitmap = Bitmap(words.count)
        hits = ctypes.c_uint32()
        named = (self.id, _small(group), words.address, words.count)
        answer = (bitmap.address, bitmap.words, ctypes.byref(hits))
        with self._client._gate as handle:
            self._library.check(self._library.pega_probe_membership(handle, *named, *answer))
        return bitmap

    # ------------------------------------------------------------ requests

    def query(
        self,
        key: int,
        hashes: Hashes,
        *,
        group: int = 0,
        ttl_ms: int = 0,
        fetch: Fetch = Fetch.POLL,
        limit_ms: int = 0,
    ) -> int:
        """Pins cached blocks and answers with a lease on them: for group 0 the longest cached
        prefix, for any other group every cached position (`Completion.bitmap`).

        `key` is the engine's name of its request, 64 bits. The same key and hashes give the same
        lease again; the same key with other hashes replaces it. `ttl_ms` is the lease's time to
        live; 0 takes the daemon's default. While the daemon is away it completes as a miss.

        `fetch` says what becomes of blocks below the daemon's pool. With `Fetch.POLL` the status is
        `LOADING`, without a lease, while they come up: repeat the query. With `Fetch.WAIT` it
        completes when they are in, or after `limit_ms` (0: no limit) with those that are.
        """
        words = hash_list(hashes)
        bitmap = Bitmap(words.count) if group else None
        named = (self.id, _small(group), fits("key", key, U64), words.address, words.count)
        ttl = fits("ttl_ms", ttl_ms, U64)
        answer = (None, 0) if bitmap is None else (bitmap.address, bitmap.words)
        # A completion may be there before the call is back: who takes it waits for the note.
        with self._client._bitmaps_lock if bitmap is not None else nullcontext():
            if fetch == Fetch.POLL and not limit_ms:
                call = self._library.pega_query
                return self._client._submit(call, *named, ttl, *answer, bitmap=bitmap)
            limit = fits("limit_ms", limit_ms, U64)
            size = ctypes.sizeof(_abi.pega_query_options)
            options = ctypes.byref(_abi.pega_query_options(size, fetch, ttl, limit))
            call = self._library.pega_query_with
            return self._client._submit(call, *named, options, *answer, bitmap=bitmap)

    def load(
        self,
        lease: int,
        blocks: Blocks,
        *,
        first: int = 0,
        group: int = 0,
        after: Order | None = None,
        steps: int | None = None,
    ) -> int:
        """Copies pages of a lease into the engine's blocks: the lease's position `first + i` goes
        to `blocks[i]`. A lease lists hits only.

        Each worker rank loads from a lease once. The blocks must not be touched until the
        completion; after another status than OK their content is undefined.

        With `steps` (GPU memory only; 1 up to the number of the group's segments, 256 at most) the
        segments come in so many steps, those of the first layers first, and `Client.stream_wait`
        lets the engine's work on them begin while the others are on their way. Step n, counted from
        1, has segments `(n - 1) * segments // steps` up to `n * segments // steps` of all blocks.
        """
        words = block_list(blocks)
        arguments = (
            self.id,
            _small(group),
            fits("lease", lease, U64),
            fits("first", first, U32),
            words.address,
            words.count,
            _after(after),
        )
        if steps is None:
            return self._client._submit(self._library.pega_load_after, *arguments)
        call = self._library.pega_load_in_steps
        return self._client._submit(call, *arguments, fits("steps", steps, U32))

    def save(
        self,
        hashes: Hashes,
        blocks: Blocks,
        *,
        group: int = 0,
        after: Order | None = None,
    ) -> int:
        """Copies `blocks[i]` into the pool under the name `hashes[i]`.

        The blocks must not change until the completion. A block becomes a hit once every rank has
        saved its shard. Raises ValueError for lists of different lengths.
        """
        names, words = hash_list(hashes), block_list(blocks)
        if names.count != words.count:
            raise ValueError(f"{names.count} hashes for {words.count} blocks")
        return self._client._submit(
            self._library.pega_save_after,
            self.id,
            _small(group),
            names.address,
            words.address,
            words.count,
            _after(after),
        )

    def release(self, lease: int) -> int:
        """Gives a lease back without loading. One that is over completes with that as its status:
        harmless."""
        return self._client._submit(self._library.pega_release, self.id, fits("lease", lease, U64))

    def renew(self, lease: int, *, ttl_ms: int = 0) -> int:
        """Sets a lease's time to live to `ttl_ms` from now; 0 takes the daemon's default."""
        return self._client._submit(
            self._library.pega_renew,
            self.id,
            fits("lease", lease, U64),
            fits("ttl_ms", ttl_ms, U64),
        )

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()

    def __repr__(self) -> str:
        return f"Registration({'ended' if self._number is None else self._number})"


def _after(order: Order | None) -> _abi.pega_order | None:
    return None if order is None else order.to_c()


def _small(group: int) -> int:
    return fits("group", group, U16)
