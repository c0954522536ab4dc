"""The client against a real daemon."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pegaflow.client import (
    AgainError,
    AlreadyRegisteredError,
    BadLayoutError,
    BlockOutOfRangeError,
    Client,
    ClosedError,
    Completion,
    DeviceUnavailableError,
    DisconnectedError,
    Group,
    InvalidArgumentError,
    LeaseConsumedError,
    LeaseError,
    LibraryError,
    LogLevel,
    Mode,
    NoDaemonError,
    Op,
    Options,
    Order,
    OrderKind,
    Reason,
    Registration,
    SaveOnlyError,
    Segment,
    State,
    Status,
    StatusError,
    TimeoutError,
    TooManyError,
    UnknownRequestError,
    connect,
    library_version,
    segments_of,
)
from pegaflow.client._library import Library, find

from .support import NAMESPACE, SOON_MS, Daemon, eventually, hashes, worker


def test_saved_blocks_are_loaded_with_every_byte(client: Client) -> None:
    layers = [np.asarray(client.alloc_host(2 * 16 * 512)).reshape(2, 16, 512) for _ in range(3)]
    group = Group.of(layers, block_dim=1)
    registration = client.register_worker("bytes", NAMESPACE, [group])
    registration.wait_ready(SOON_MS)
    random = np.random.default_rng(1)
    for layer in layers:
        layer[:] = random.integers(0, 256, layer.shape, np.uint8)
    before = [layer.copy() for layer in layers]

    saved = client.wait(registration.save(hashes(4), [3, 1, 7, 0]), SOON_MS).check()
    assert (saved.op, saved.count, saved.bytes) == (Op.SAVE, 4, 4 * 6 * 512)
    again = client.wait(registration.save(hashes(5), range(5)), SOON_MS).check()
    assert (again.count, again.skipped) == (1, 4)

    found = client.wait(registration.query(9, hashes(6)), SOON_MS).check()
    assert (found.count, found.reason, found.bitmap) == (5, Reason.ABSENT, None)
    loaded = client.wait(
        registration.load(found.lease, np.array([8, 9, 10, 11]), first=0), SOON_MS
    ).check()
    assert (loaded.count, loaded.bytes, loaded.lease) == (4, 4 * 6 * 512, found.lease)
    for layer, old in zip(layers, before, strict=True):
        assert (layer[:, [8, 9, 10, 11]] == old[:, [3, 1, 7, 0]]).all()
        assert (layer[:, :8] == old[:, :8]).all()
        assert (layer[:, 12:] == old[:, 12:]).all()


def test_memory_of_the_process_works_as_well(client: Client) -> None:
    memory = np.zeros((8, 4096), np.uint8)
    registration = client.register_worker("own", NAMESPACE, [Group.of(memory)])
    registration.wait_ready(SOON_MS)
    memory[2] = 7
    saved = client.wait(registration.save(hashes(1), [2]), SOON_MS)
    if saved.status == Status.COPY_FAILED:
        pytest.skip("this machine forbids the daemon to read memory of other processes")
    lease = client.wait(registration.query(1, hashes(1)), SOON_MS).check().lease
    client.wait(registration.load(lease, [5]), SOON_MS).check()
    assert (memory[5] == 7).all()
    assert not memory[6].any()


def test_a_scheduler_queries_and_the_worker_loads(daemon: Daemon) -> None:
    with daemon.client() as engine, daemon.client() as core:
        memory = np.asarray(engine.alloc_host(8 * 1024)).reshape(8, 1024)
        scheduler = core.register_scheduler("pair", NAMESPACE)
        with pytest.raises(TimeoutError, match="timeout"):
            scheduler.wait_ready(0)
        ranks = engine.register_worker("pair", NAMESPACE, [Group.of(memory)])
        scheduler.wait_ready(SOON_MS)
        memory[0] = 5
        engine.wait(ranks.save(hashes(1), [0]), SOON_MS).check()
        assert scheduler.probe(hashes(3)) == 1
        found = core.wait(scheduler.query(3, hashes(3)), SOON_MS).check()
        assert core.wait(scheduler.query(3, hashes(3)), SOON_MS).check().lease == found.lease
        engine.wait(ranks.load(found.lease, [4]), SOON_MS).check()
        assert (memory[4] == 5).all()
        over = engine.wait(ranks.load(found.lease, [4]), SOON_MS)
        with pytest.raises(LeaseError):
            over.check()
        assert core.wait(scheduler.release(found.lease), SOON_MS).status != Status.OK


def test_other_groups_answer_with_a_bitmap(client: Client) -> None:
    memory = np.asarray(client.alloc_host(2 * 8 * 1024)).reshape(2, 8, 1024)
    groups = [Group.of(memory[0]), Group.of(memory[1], group=1)]
    registration = client.register_worker("hybrid", NAMESPACE, groups)
    registration.wait_ready(SOON_MS)
    names = hashes(70)
    memory[1, :3] = np.arange(1, 4, dtype=np.uint8)[:, None]
    stored = [names[0], names[3], names[69]]
    client.wait(registration.save(stored, [0, 1, 2], group=1), SOON_MS).check()

    assert registration.probe_membership(names, group=1).positions() == [0, 3, 69]
    assert registration.probe(names, group=1) == 1
    assert registration.probe(names) == 0
    found = client.wait(registration.query(1, names, group=1), SOON_MS).check()
    assert found.bitmap is not None
    assert (found.count, found.bitmap.positions()) == (3, [0, 3, 69])
    client.wait(registration.load(found.lease, [7], first=2, group=1), SOON_MS).check()
    assert (memory[1, 7] == 3).all()
    # The answer of a poll has it too.
    request = registration.query(2, names, group=1)
    (polled,) = polled_until(client, 1)
    assert polled.request == request
    assert polled.bitmap is not None
    assert polled.bitmap.positions() == [0, 3, 69]
    assert not client._bitmaps


def polled_until(client: Client, count: int) -> list[Completion]:
    found: list[Completion] = []
    poller = select.poll()
    poller.register(client.fileno(), select.POLLIN)
    while len(found) < count:
        more = client.poll()
        found += more
        if not more:
            assert poller.poll(SOON_MS), "the descriptor tells of what comes"
    return found


def test_the_descriptor_wakes_whoever_polls(client: Client) -> None:
    assert client.poll() == []
    requests = {client.nop() for _ in range(100)}
    found = polled_until(client, 100)
    assert {one.request for one in found} == requests
    assert {one.op for one in found} == {Op.NOP}
    for _ in range(5):
        client.nop()
    parts: list[int] = []

    def all_in_parts() -> bool:
        parts.append(len(client.poll(capacity=2)))
        return sum(parts) == 5

    assert client.poll(capacity=0) == []
    eventually(all_in_parts, "all are finished")
    assert max(parts) <= 2


def test_a_renewed_lease_lives_on_and_a_released_one_is_over(client: Client) -> None:
    registration, _ = worker(client)
    client.wait(registration.save(hashes(2), [0, 1]), SOON_MS).check()
    lease = client.wait(registration.query(1, hashes(2), ttl_ms=5000), SOON_MS).check().lease
    renewed = client.wait(registration.renew(lease, ttl_ms=60_000), SOON_MS).check()
    assert (renewed.lease, renewed.value) == (lease, 60_000)
    client.wait(registration.release(lease), SOON_MS).check()
    over = client.wait(registration.load(lease, [4, 5]), SOON_MS)
    with pytest.raises(LeaseError) as caught:
        over.check()
    assert caught.value.status == over.status
    assert client.unloaded_blocks(over.request) == [4, 5]
    with pytest.raises(UnknownRequestError):
        client.unloaded_blocks(over.request + 999)


def test_what_the_daemon_says_is_an_exception_of_its_own(client: Client) -> None:
    registration, _ = worker(client, blocks=4)
    wrong = client.wait(registration.save(hashes(1), [4]), SOON_MS)
    with pytest.raises(BlockOutOfRangeError, match="value 4") as caught:
        wrong.check()
    assert caught.value.status == Status.BLOCK_OUT_OF_RANGE
    assert isinstance(caught.value, ValueError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.status, str(copy)) == (
        BlockOutOfRangeError,
        caught.value.status,
        str(caught.value),
    )
    client.wait(registration.save(hashes(1), [0]), SOON_MS).check()
    lease = client.wait(registration.query(1, hashes(1)), SOON_MS).check().lease
    client.wait(registration.load(lease, [1]), SOON_MS).check()
    with pytest.raises(LeaseError):
        client.wait(registration.load(lease, [1]), SOON_MS).check()
    assert issubclass(LeaseConsumedError, LeaseError)


def test_arguments_that_do_not_fit_are_refused_and_not_cut_off(client: Client) -> None:
    registration, _ = worker(client)
    for call in (
        lambda: registration.query(1 << 64, hashes(1)),
        lambda: registration.query(-1, hashes(1)),
        lambda: registration.query(1, hashes(1), group=1 << 16),
        lambda: registration.query(1, hashes(1), ttl_ms=-1),
        lambda: registration.probe(hashes(1), group=-1),
        lambda: registration.load(1 << 64, [0]),
        lambda: registration.load(1, [0], first=1 << 32),
        lambda: registration.save(hashes(2), [0]),
        lambda: registration.release(-1),
        lambda: registration.renew(1, ttl_ms=1 << 64),
        lambda: client.wait(1, -1),
        lambda: client.wait(1 << 64, 0),
        lambda: client.cancel(-1),
        lambda: client.alloc_host(0),
        lambda: client.alloc_host(-1),
    ):
        with pytest.raises(ValueError, match=r"\S"):
            call()
    assert client.stats().outstanding == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("connect_timeout_ms", Options(connect_timeout_ms=-1)),
        ("control_timeout_ms", Options(control_timeout_ms=1 << 64)),
        ("spin_ns", Options(spin_ns=-1)),
        ("arena_bytes", Options(arena_bytes=-1)),
        ("ring_slots", Options(ring_slots=(1 << 32) + 256)),
        ("completion_slots", Options(completion_slots=-1)),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(name: str, options: Options) -> None:
    with pytest.raises(ValueError, match=f"{name} .* is not in 0 to"):
        Client(options)


def test_a_registration_that_does_not_fit_is_refused_by_name(client: Client) -> None:
    memory = client.alloc_host(8192)
    segment = Segment(memory.address, 1024, 1024)
    group = Group([segment], 8)
    register = client.register_worker

    def of_segment(changed: Segment) -> Registration:
        return register("a", NAMESPACE, [Group([changed], 8)])

    refused: list[tuple[str, Callable[[], object]]] = [
        ("world_size", lambda: register("a", NAMESPACE, [group], world_size=(1 << 32) + 1)),
        ("rank", lambda: register("a", NAMESPACE, [group], rank=-2)),
        ("rank", lambda: register("a", NAMESPACE, [group], rank=1 << 32)),
        ("block_tokens", lambda: register("a", replace(NAMESPACE, block_tokens=-1), [group])),
        ("num_blocks", lambda: register("a", NAMESPACE, [replace(group, num_blocks=1 << 32)])),
        ("group", lambda: register("a", NAMESPACE, [replace(group, group=1 << 16)])),
        ("block_stride", lambda: of_segment(replace(segment, block_stride=-1024))),
        ("block_bytes", lambda: of_segment(replace(segment, block_bytes=1 << 64))),
        ("address", lambda: of_segment(replace(segment, address=-1))),
    ]
    for name, call in refused:
        with pytest.raises(ValueError, match=f"^{name} .* is not in 0 to"):
            call()
    register("a", NAMESPACE, [group])


def test_a_list_beyond_the_limits_names_them(client: Client) -> None:
    registration, _ = worker(client)
    limits = client.limits()
    assert limits.requests == 256
    with pytest.raises(TooManyError):
        registration.query(1, bytes(32 * (limits.query_hashes + 1)))


def test_no_room_is_an_error_of_its_own_and_passes(client: Client) -> None:
    requests: list[int] = []

    def flood() -> None:
        while len(requests) < 1000:
            requests.append(client.nop())

    with pytest.raises(AgainError):
        flood()
    for request in requests:
        client.wait(request, SOON_MS).check()
    assert client.stats().again == 1
    client.wait(client.nop(), SOON_MS).check()


def test_a_request_is_consumed_once(client: Client) -> None:
    request = client.nop()
    client.wait(request, SOON_MS)
    with pytest.raises(UnknownRequestError):
        client.wait(request, 0)
    with pytest.raises(UnknownRequestError):
        client.cancel(request)


def test_a_layout_that_cannot_be_is_refused_with_the_field(client: Client) -> None:
    memory = client.alloc_host(8192)
    with pytest.raises((BadLayoutError, InvalidArgumentError)):
        client.register_worker(
            "bad", NAMESPACE, [Group([Segment(memory.address, 1024, 0)], num_blocks=8)]
        )
    with pytest.raises((BadLayoutError, InvalidArgumentError)):
        client.register_worker("bad", NAMESPACE, [])
    with pytest.raises(ValueError, match="zero character"):
        client.register_scheduler("a\0b", NAMESPACE)


def test_a_rank_is_there_once(daemon: Daemon, client: Client) -> None:
    memory = client.alloc_host(4096)
    group = Group(segments_of(memory.view().cast("B", [4, 1024])), 4)
    first = client.register_worker("once", NAMESPACE, [group], rank=1, world_size=2)
    with daemon.client() as other:
        theirs = Group.of(other.alloc_host(4096).view().cast("B", [4, 1024]))
        with pytest.raises(AlreadyRegisteredError):
            other.register_worker("once", NAMESPACE, [theirs], rank=1, world_size=2)
    with pytest.raises(InvalidArgumentError, match="registration"):
        memory.free()
    first.unregister()
    first.unregister()
    with pytest.raises(ClosedError, match="registration has ended"):
        first.probe(hashes(1))
    memory.free()
    memory.free()
    with pytest.raises(ClosedError, match="freed"):
        memory.view()


def test_a_save_only_registration_does_not_query(client: Client) -> None:
    group = Group.of(client.alloc_host(4096).view().cast("B", [4, 1024]))
    registration = client.register_worker("only", NAMESPACE, [group], mode=Mode.SAVE_ONLY)
    registration.wait_ready(SOON_MS)
    client.wait(registration.save(hashes(1), [0]), SOON_MS).check()
    with pytest.raises(SaveOnlyError):
        client.wait(registration.query(1, hashes(1)), SOON_MS).check()


def test_parts_of_host_memory_stay_inside(client: Client) -> None:
    memory = client.alloc_host(100)
    memory.view(10, 5)[:] = b"hello"
    assert bytes(memory.view()[9:16]) == b"\0hello\0"
    assert np.asarray(memory)[10] == ord("h")
    for offset, nbytes in ((-1, 5), (96, 5), (101, None), (0, -1)):
        with pytest.raises(ValueError, match="of 100"):
            memory.view(offset, nbytes)


def test_an_order_over_memory_that_is_no_gpus_is_refused(client: Client) -> None:
    registration, _ = worker(client)
    with pytest.raises(InvalidArgumentError):
        registration.save(hashes(1), [0], after=Order.stream(1))
    none = Order(OrderKind.NONE, 0)
    client.wait(registration.save(hashes(1), [0], after=none), SOON_MS).check()


def test_a_load_in_steps_is_for_gpu_memory_and_no_other_load_can_be_waited_for_on_a_stream(
    client: Client,
) -> None:
    registration, _ = worker(client)
    client.wait(registration.save(hashes(2), [0, 1]), SOON_MS).check()
    found = client.wait(registration.query(1, hashes(2)), SOON_MS).check()
    with pytest.raises(InvalidArgumentError, match="steps"):
        registration.load(found.lease, [2, 3], steps=1)
    with pytest.raises(InvalidArgumentError, match="steps"):
        registration.load(found.lease, [2, 3], steps=0)
    with pytest.raises(ValueError, match="steps"):
        registration.load(found.lease, [2, 3], steps=-1)
    # The refused ones took nothing: the lease is still good for its one load.
    request = registration.load(found.lease, [2, 3])
    with pytest.raises(DeviceUnavailableError):
        client.stream_wait(request, 1, 0)
    client.wait(request, SOON_MS).check()
    with pytest.raises(UnknownRequestError):
        client.stream_wait(request, 1, 0)
    with pytest.raises(ValueError, match="steps"):
        client.stream_wait(request, -1, 0)


# ---------------------------------------------------------------- the daemon is away


def test_without_a_daemon_connecting_fails_or_begins_disconnected(tmp_path: Path) -> None:
    options = Options(socket=str(tmp_path / "none.sock"))
    with pytest.raises(NoDaemonError, match=r"none\.sock"):
        Client(options)
    with Client(Options(socket=options.socket, start_without_daemon=True)) as client:
        assert client.state == State.DISCONNECTED
        registration = client.register_scheduler("early", NAMESPACE)
        assert registration.probe(hashes(2)) == 0
        missed = client.wait(registration.query(1, hashes(2)), SOON_MS)
        assert (missed.status, missed.count) == (Status.DISCONNECTED, 0)
        with pytest.raises(DisconnectedError):
            missed.check()
        with pytest.raises(DisconnectedError):
            client.nop()


def test_a_client_outlives_its_daemon(daemon: Daemon) -> None:
    lines: list[tuple[LogLevel, str]] = []
    options = daemon.options()
    with connect(
        node=options.node,
        socket=options.socket,
        client_name="outliver",
        log=lambda level, line: lines.append((level, line)),
    ) as client:
        registration, view = worker(client)
        view[:4096] = b"x" * 4096
        client.wait(registration.save(hashes(1), [0]), SOON_MS).check()
        number = registration.id
        daemon.kill()
        eventually(lambda: client.state == State.DISCONNECTED, "the end is noticed")
        daemon.start()
        eventually(lambda: client.state == State.CONNECTED, "the client is back")
        registration.wait_ready(SOON_MS)
        assert registration.id == number
        lease = client.wait(registration.query(1, hashes(1)), SOON_MS).check().lease
        client.wait(registration.load(lease, [3]), SOON_MS).check()
        assert bytes(view[3 * 4096 : 4 * 4096]) == b"x" * 4096
        stats = client.stats()
        assert (stats.disconnects, stats.reconnects, stats.state) == (1, 1, State.CONNECTED)
        assert stats.away_ms > 0
    assert {level for level, _ in lines} == {LogLevel.WARN}
    assert "away" in lines[0][1]
    assert any("connected to node" in line for _, line in lines)


def test_a_refusal_that_may_pass_is_told_when_the_time_has_run_out(daemon: Daemon) -> None:
    daemon.stop()
    options = replace(daemon.options(), start_without_daemon=True)
    with Client(options) as one, Client(options) as other:
        registrations = []
        for client in (one, other):
            group = Group.of(client.alloc_host(4096).view().cast("B", [4, 1024]))
            registrations.append(client.register_worker("twice", NAMESPACE, [group]))
        daemon.start()
        eventually(lambda: sum(ready(one) for one in registrations) == 1, "one is accepted")
        first, second = sorted(registrations, key=ready, reverse=True)
        eventually(lambda: second.client.stats().refused_registrations == 1, "one is refused")
        with pytest.raises(AlreadyRegisteredError):
            second.wait_ready(0)
        timer = threading.Timer(0.5, first.client.close)
        timer.start()
        second.wait_ready(SOON_MS)
        timer.join()


def ready(registration: Registration) -> bool:
    try:
        registration.wait_ready(0)
    except (AlreadyRegisteredError, TimeoutError):
        return False
    return True


def test_lines_go_to_the_logger_of_the_package(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    with daemon.client() as client:
        daemon.kill()
        eventually(lambda: client.state == State.DISCONNECTED, "the end is noticed")
        eventually(lambda: bool(caplog.records), "a line is logged")
    assert caplog.records[0].name == "pegaflow.client"
    assert caplog.records[0].levelname == "WARNING"


def test_a_log_callback_that_fails_harms_nothing(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_level: LogLevel, _line: str) -> None:
        raise RuntimeError("the callback's own")

    options = daemon.options()
    with connect(node=options.node, socket=options.socket, log=fail) as client:
        daemon.kill()
        eventually(lambda: bool(caplog.records), "the failure is logged")
        daemon.start()
        eventually(lambda: client.state == State.CONNECTED, "the client is back")
    assert "the log callback failed on: the daemon is away" in caplog.text
    assert "the callback's own" in caplog.text


def test_the_daemon_is_started_on_demand(daemon: Daemon) -> None:
    from .support import binaries

    daemon.stop()
    options = daemon.options()
    with pytest.raises(NoDaemonError):
        connect(
            node=options.node,
            socket=options.socket,
            autostart=True,
            daemon=str(daemon.folder / "no-such-program"),
        )
    environment = {**os.environ, "PEGAFLOW_POOL_SIZE": "16MiB", "PEGAFLOW_HTTP": "off"}
    code = (
        "import sys; from pegaflow.client import connect\n"
        "with connect(node=sys.argv[1], socket=sys.argv[2], daemon=sys.argv[3],"
        " autostart=True, connect_timeout_ms=30000) as client:\n"
        "    client.wait(client.nop(), 30000).check()\n"
        # Engines that end kill what descends from them.
        "    import os, pathlib\n"
        "    def parent(stat):\n"
        "        try:\n"
        "            return int(stat.read_text().rpartition(')')[2].split()[1])\n"
        "        except OSError:\n"
        "            return 0\n"
        "    assert os.getpid() not in map(parent, pathlib.Path('/proc').glob('[0-9]*/stat'))\n"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            daemon.node,
            str(daemon.socket),
            str(binaries() / "pegaflowd"),
        ],
        check=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    with daemon.client() as client:
        client.wait(client.nop(), SOON_MS).check()
    (found,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and daemon.node.encode() in cmdline(entry)
    ]
    os.kill(found, 15)
    eventually(lambda: not daemon.socket.exists(), "the daemon stops")


def cmdline(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


# ---------------------------------------------------------------- the library


def test_a_missing_library_is_named_with_all_that_was_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pegaflow.client import _library

    monkeypatch.delenv("PEGAFLOW_LIBRARY")
    bundled = tmp_path / "libpegaflow.so.0"
    monkeypatch.setattr(_library, "BUNDLED", bundled)
    with pytest.raises(LibraryError, match=r"PEGAFLOW_LIBRARY is not set, and .*pegaflow\.so\.0"):
        find()
    bundled.touch()
    assert find() == bundled
    monkeypatch.setenv("PEGAFLOW_LIBRARY", str(tmp_path / "other.so"))
    with pytest.raises(LibraryError, match=r"PEGAFLOW_LIBRARY names .*other\.so"):
        find()


def test_what_is_no_pegaflow_library_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(LibraryError, match=r"cannot load .*text\.so"):
        Library(text)
    with pytest.raises(LibraryError, match="no PegaFlow library"):
        Library(Path("libc.so.6"))


def test_a_library_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pegaflow.client import _abi

    spoken = _abi.ABI_VERSION
    monkeypatch.setattr(_abi, "ABI_VERSION", 99)
    with pytest.raises(LibraryError, match=f"ABI version {spoken}, this package needs 99"):
        Library(find())


def test_package_and_library_have_one_version() -> None:
    import pegaflow

    assert library_version() == pegaflow.__version__


def test_every_status_has_an_exception_of_its_own() -> None:
    from pegaflow.client.errors import error_of

    errors = [error_of(status, "the text") for status in Status if status != Status.OK]
    assert len({type(error) for error in errors}) == len(Status) - 1
    for error in errors:
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.status, copy.text) == (type(error), error.status, "the text")
        assert str(copy) == str(error) == f"{error.status.name.lower()}: the text"
    assert type(error_of(Status(77), "new")) is StatusError
    assert str(error_of(Status(77), "new")) == "unknown_77: new"
