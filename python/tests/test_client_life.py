"""How a client ends: closed, dropped, interrupted, forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from pegaflow.client import (
    Client,
    ClosedError,
    Completion,
    Group,
    InvalidArgumentError,
    LogLevel,
    PegaError,
    State,
    TimeoutError,
    connect,
)

from .support import NAMESPACE, SOON_MS, Daemon, eventually, hashes, worker


def test_a_closed_client_answers_with_an_error(daemon: Daemon) -> None:
    client = daemon.client()
    registration, _ = worker(client)
    memory = client.alloc_host(4096)
    client.close()
    client.close()
    assert client.closed
    assert client.state == State.CLOSED
    for call in (
        client.stats,
        client.limits,
        client.nop,
        client.poll,
        client.fileno,
        lambda: client.wait(1, 0),
        lambda: client.alloc_host(1),
        lambda: registration.probe(hashes(1)),
        lambda: registration.save(hashes(1), [0]),
        lambda: registration.query(1, hashes(1), group=1),
        lambda: memory.address,
    ):
        with pytest.raises(ClosedError):
            call()
    registration.unregister()
    memory.free()


def test_closing_ends_the_waits_of_other_threads(daemon: Daemon) -> None:
    client = daemon.client()
    # Never ready: the other rank does not come.
    scheduler = client.register_scheduler("waiting", NAMESPACE)
    errors: list[Exception] = []
    inside = threading.Event()

    def wait() -> None:
        inside.set()
        try:
            scheduler.wait_ready(600_000)
        except PegaError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait()
    client.close()
    for thread in threads:
        thread.join(SOON_MS / 1000)
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [ClosedError] * 4


def test_a_call_that_never_left_does_not_hold_up_the_end_for_ever(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    client = daemon.client()
    client._longest_call_s = 0.01
    # As if a signal had come between the entrance and the call.
    handle = client._gate.__enter__()
    client.close()
    assert client.closed
    assert "1 calls are still inside" in caplog.text
    client._library.pega_disconnect(handle)


def test_a_wait_lets_other_threads_run_and_hears_signals(client: Client) -> None:
    scheduler = client.register_scheduler("signals", NAMESPACE)
    # Python leaves the signal ignored where whoever started it ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            scheduler.wait_ready(SOON_MS)
    finally:
        signal.signal(signal.SIGINT, before)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        scheduler.wait_ready(120)
    assert time.monotonic() - start >= 0.12


def test_ctrl_c_as_a_query_returns_leaves_its_bitmap_to_the_completion(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = client.alloc_host(1024)
    groups = [Group.of(memory.view(at * 512, 512).cast("B", [8, 64]), group=at) for at in range(2)]
    registration = client.register_worker("ctrl-c", NAMESPACE, groups)
    registration.wait_ready(SOON_MS)
    client.wait(registration.save(hashes(3), [0, 1, 2], group=1), SOON_MS).check()
    query = client._library.pega_query

    def interrupted(*arguments: object) -> int:
        query(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(client._library, "pega_query", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registration.query(1, hashes(3), group=1)
    found: list[Completion] = []

    def polled() -> bool:
        found.extend(client.poll())
        return bool(found)

    eventually(polled, "the query completes")
    bitmap = found[0].check().bitmap
    assert bitmap is not None
    assert bitmap.to_int() == 0b111


def test_a_client_that_is_dropped_while_its_own_thread_logs_is_closed_by_another(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[Client] = []
    logging, closing = set[int](), set[int]()

    def log(_level: LogLevel, _line: str) -> None:
        # The last reference goes on the library's thread, which closing waits for.
        logging.add(threading.get_ident())
        clients.clear()

    options = replace(daemon.options(), log=log)
    with warnings.catch_warnings():
        # A warning that is recorded would keep what it is about.
        warnings.simplefilter("ignore", ResourceWarning)
        clients.append(Client(options))
        gone, library = weakref.ref(clients[0]), clients[0]._library
        disconnect = library.pega_disconnect

        def recorded(handle: int) -> None:
            closing.add(threading.get_ident())
            disconnect(handle)

        monkeypatch.setattr(library, "pega_disconnect", recorded)
        daemon.kill()
        eventually(lambda: gone() is None, "the client is closed")
    assert logging
    assert closing
    assert not logging & closing


def test_a_client_that_is_dropped_is_closed_with_a_warning(daemon: Daemon) -> None:
    clients = [daemon.client()]
    gone = weakref.ref(clients[0])
    with pytest.warns(ResourceWarning, match="unclosed Client"):
        clients.clear()
    assert gone() is None


def test_many_threads_share_a_client(client: Client) -> None:
    registration, _ = worker(client, blocks=64)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            names = hashes(8, salt=number)
            for turn in range(30):
                blocks = [number * 8 + at for at in range(8)]
                client.wait(registration.save(names, blocks), SOON_MS).check()
                found = client.wait(
                    registration.query(number << 32 | turn, names, group=0), SOON_MS
                ).check()
                assert found.count == 8
                client.wait(registration.load(found.lease, blocks), SOON_MS).check()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert client.stats().outstanding == 0


def test_a_forked_child_is_refused_and_leaves_the_parents_session(daemon: Daemon) -> None:
    code = (
        "import os, sys\n"
        "from pegaflow.client import *\n"
        "client = connect(node=sys.argv[1], socket=sys.argv[2])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        client.nop()\n"
        "    except InvalidArgumentError as error:\n"
        "        client.close()\n"
        "        os._exit(0 if 'process' in str(error) else 2)\n"
        "    os._exit(3)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "client.wait(client.nop(), 30000).check()\n"
        # Not closed: the end of the process does it, while the library may still want to log.
    )
    subprocess.run(
        [sys.executable, "-c", code, daemon.node, str(daemon.socket)],
        check=True,
        cwd=Path(__file__).parent.parent,
    )


def test_a_process_ends_well_while_the_library_logs(daemon: Daemon) -> None:
    code = (
        "import os, sys\n"
        "from pegaflow.client import *\n"
        "client = connect(node=sys.argv[1], socket=sys.argv[2],"
        " log_level=LogLevel.INFO, log=lambda level, line: print(line))\n"
        "os.kill(int(sys.argv[3]), 9)\n"
    )
    assert daemon.process is not None
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            daemon.node,
            str(daemon.socket),
            str(daemon.process.pid),
        ],
        check=True,
        cwd=Path(__file__).parent.parent,
        timeout=SOON_MS / 1000,
    )


def test_options_are_given_whole_or_by_name(daemon: Daemon) -> None:
    with pytest.raises(TypeError, match="either"):
        connect(daemon.options(), node="a")
    with pytest.raises(TypeError, match="nodes"):
        connect(nodes="a")
    with pytest.raises(InvalidArgumentError, match="ring_slots"):
        connect(socket=str(daemon.socket), ring_slots=17)
