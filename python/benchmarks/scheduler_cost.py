"""What a query of a long prompt costs the scheduler, and where the time goes.

Starts a daemon of its own, saves a prompt of BLOCKS blocks, and measures in one process, one
sample after the other, medians:

    first      hashes as list[bytes], a new key: what the first lookup of a request costs
      pack     joining the list to one buffer, which can be kept (pack_hashes)
      python   the package's own code around the two calls of the library
      ctypes   two foreign calls with that many arguments
      library  the rest: libpegaflow and the daemon
    packed     the same with a packed buffer
    again      the same key and hashes once more: the library compares and answers with the lease
    probe      the longest cached prefix, by reading shared memory
    connector  get_num_new_matched_tokens of the vLLM connector's scheduler side, a new request
    repeat     the same request again, as vLLM asks in each step until it has room
    adapter    get_num_new_matched_tokens of a new request with a LoRA adapter
    copy       copying as many bytes as the hashes have, for comparison

Usage: python benchmarks/scheduler_cost.py [--blocks N] [--samples N]
PEGAFLOW_BIN_DIR names the folder of pegaflowd; else it is the one that came with the package.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pegaflow._scripts import NATIVE
from pegaflow.client import Client, Group, Namespace, Options, Registration, _abi, pack_hashes
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.groups import CacheGroup
from pegaflow.connector.lookup import Lookup
from pegaflow.connector.names import Adapters, packed
from pegaflow.connector.scheduler import Scheduler

PAGE_BYTES = 512
BLOCK_TOKENS = 16
BOUND_MS = 60_000


@contextmanager
def daemon(blocks: int) -> Iterator[Options]:
    """A daemon whose pool has room for the prompt."""
    folder = Path(tempfile.mkdtemp(prefix="pegaflow-cost-"))
    node, socket = f"cost-{os.getpid()}", folder / "daemon.sock"
    program = Path(os.environ.get("PEGAFLOW_BIN_DIR") or NATIVE) / "pegaflowd"
    pool = max(64 << 20, 2 * blocks * PAGE_BYTES)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                "--node",
                node,
                "--socket",
                socket,
                "--http",
                "off",
                "--pool-size",
                str(pool),
                "--extent-size",
                "4MiB",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        while not socket.exists():
            if process.poll() is not None:
                raise SystemExit((folder / "log").read_text())
            time.sleep(0.01)
        yield Options(node=node, socket=str(socket))
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)
        shm = Path(os.environ.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow"))
        shutil.rmtree(shm / node, ignore_errors=True)


def save(client: Client, worker: Registration, hashes: list[bytes]) -> None:
    """Saves the prompt; all blocks out of the same few of the engine's."""
    step = 4096
    for at in range(0, len(hashes), step):
        part = hashes[at : at + step]
        client.wait(worker.save(part, range(len(part))), BOUND_MS).check()


def median_us(samples: int, measured: Callable[[int], object]) -> float:
    """Median of `samples` runs, in microseconds; `measured` gets the sample's number."""
    times = []
    for at in range(samples):
        start = time.perf_counter_ns()
        measured(at)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


class Cost:
    """One client with the saved prompt."""

    def __init__(self, client: Client, worker: Registration, hashes: list[bytes]) -> None:
        self.client, self.worker, self.hashes = client, worker, hashes
        self.packed = pack_hashes(hashes)
        self.keys = iter(range(1, 1 << 62))

    def ask(self, hashes: object, key: int) -> int:
        """A query as the scheduler makes it; returns its lease."""
        found = self.client.wait(self.worker.query(key, hashes), BOUND_MS).check()
        if found.count != len(self.hashes):
            raise SystemExit(f"{found.count} of {len(self.hashes)} blocks are hits")
        return found.lease

    def queries(self, samples: int, hashes: object) -> float:
        """Median of queries with keys of their own; leases are released in between, unmeasured."""
        times = []
        for _ in range(samples):
            key = next(self.keys)
            start = time.perf_counter_ns()
            lease = self.ask(hashes, key)
            times.append(time.perf_counter_ns() - start)
            self.client.wait(self.worker.release(lease), BOUND_MS).check()
        return statistics.median(times) / 1000

    def raw(self, samples: int) -> float:
        """The same two calls of the library without the package's code."""
        library = self.client._library
        request, done = ctypes.c_uint64(), _abi.pega_completion()
        times = []
        with self.client._gate as handle:
            for _ in range(samples):
                key = next(self.keys)
                start = time.perf_counter_ns()
                library.pega_query(
                    handle,
                    self.worker.id,
                    0,
                    key,
                    self.packed,
                    len(self.hashes),
                    0,
                    None,
                    0,
                    ctypes.byref(request),
                )
                library.pega_wait(handle, request.value, BOUND_MS, ctypes.byref(done))
                times.append(time.perf_counter_ns() - start)
                self.client.wait(self.worker.release(done.lease), BOUND_MS).check()
        return statistics.median(times) / 1000

    def foreign(self, samples: int) -> float:
        """Two calls with as many arguments that return at once: there is no such registration."""
        library = self.client._library
        request, done = ctypes.c_uint64(), _abi.pega_completion()

        def calls(_: int) -> None:
            library.pega_query(
                handle, 0xFFFF_FFFF, 0, 1, self.packed, 1, 0, None, 0, ctypes.byref(request)
            )
            library.pega_wait(handle, 0, 0, ctypes.byref(done))

        with self.client._gate as handle:
            return median_us(samples * 20, calls)


@dataclass(frozen=True)
class Request:
    """What the connector reads of vLLM's request."""

    request_id: str
    block_hashes: list[bytes]
    num_tokens: int
    num_computed_tokens: int = 0


class OneAdapter(Adapters):
    """Every request has the same adapter."""

    MASK = sha256(b"adapter").digest()

    def mask(self, request: object) -> bytes:  # noqa: ARG002
        return self.MASK

    @classmethod
    def hashes(cls, names: list[bytes]) -> list[bytes]:
        """vLLM's hashes of blocks that have these names at the daemon."""
        hashes = packed(names, cls.MASK)
        return [hashes[at : at + 32] for at in range(0, len(hashes), 32)]


def connector(
    cost: Cost, hashes: list[bytes], adapters: Adapters, samples: int
) -> tuple[float, float, int]:
    """Medians of the connector's first question about a request and of the next ones, and how many
    first questions a busy machine had answered with "ask again": they are left out."""
    logger = logging.getLogger("pegaflow.cost")
    config, groups = ConnectorConfig(), [CacheGroup(0, 0, BLOCK_TOKENS, 1)]
    scheduler = Scheduler(config, groups, 1, logger, adapters=adapters)
    lookup = Lookup(cost.client, cost.worker, groups, config, scheduler.counters, logger)
    scheduler.attach(lookup)
    tokens = BLOCK_TOKENS * len(cost.hashes)
    first: list[int] = []
    repeat: list[int] = []
    later = 0
    while len(first) < samples:
        if later > 10 * samples:
            raise SystemExit(f'{later} questions were answered with "ask again": too busy')
        # vLLM asks about prompts of which at least one token is left to compute.
        request = Request(f"request-{next(cost.keys)}", hashes, tokens + 1)
        for times in (first, *[repeat] * 5):
            start = time.perf_counter_ns()
            found, _between_steps = scheduler.matched(request, 0)
            took = time.perf_counter_ns() - start
            if found is None:
                later += 1
                break
            if found != tokens:
                raise SystemExit(f"{found} of {tokens} tokens are hits")
            times.append(took)
        scheduler.finished(request)
        while cost.client.stats().outstanding:
            # As each step of vLLM does: also leases of questions that were given up go back.
            lookup.poll()
    return statistics.median(first) / 1000, statistics.median(repeat) / 1000, later


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32_768)
    parser.add_argument("--samples", type=int, default=200)
    arguments = parser.parse_args()
    blocks, samples = arguments.blocks, arguments.samples
    hashes = [sha256(at.to_bytes(8, "little")).digest() for at in range(blocks)]
    namespace = Namespace(BLOCK_TOKENS, model="cost", dtype="uint8", hash_algorithm="sha256")
    with daemon(blocks) as options, Client(options) as client:
        kv = client.alloc_host(4096 * PAGE_BYTES).view().cast("B", [4096, PAGE_BYTES])
        worker = client.register_worker("cost", namespace, [Group.of(kv)])
        worker.wait_ready(BOUND_MS)
        save(client, worker, hashes)
        cost = Cost(client, worker, hashes)
        cost.queries(20, hashes)

        first = cost.queries(samples, hashes)
        packed = cost.queries(samples, cost.packed)
        raw = cost.raw(samples)
        foreign = cost.foreign(samples)
        pack = median_us(samples, lambda _: pack_hashes(hashes))
        key = next(cost.keys)
        cost.ask(cost.packed, key)
        again = median_us(samples, lambda _: cost.ask(cost.packed, key))
        probe = median_us(samples, lambda _: worker.probe(cost.packed))
        # Another object each time: `bytes(bytes)` would copy nothing.
        matched, repeat, later = connector(cost, hashes, Adapters(), samples)
        masked, _, _ = connector(cost, OneAdapter.hashes(hashes), OneAdapter(), samples)
        copy = median_us(samples, lambda _: bytearray(cost.packed))

    print(f"query of {blocks} blocks, medians of {samples}, microseconds")
    print(f"  first    {first:9.1f}   hashes as list[bytes], a new key")
    print(f"    pack     {pack:9.1f}")
    print(f"    python   {packed - raw:9.1f}")
    print(f"    ctypes   {foreign:9.1f}")
    print(f"    library  {raw - foreign:9.1f}")
    print(f"  packed   {packed:9.1f}   one buffer, a new key")
    print(f"  again    {again:9.1f}   one buffer, the same key: the same lease")
    print(f"  probe    {probe:9.1f}   one buffer")
    print(
        f"  connector{matched:9.1f}   get_num_new_matched_tokens, a new request"
        + (f" ({later} asked again)" if later else "")
    )
    print(f"  repeat   {repeat:9.1f}   the same request again")
    print(f"  adapter  {masked:9.1f}   a new request with a LoRA adapter")
    print(f"  copy     {copy:9.1f}   {32 * blocks} bytes, for comparison")


if __name__ == "__main__":
    main()
