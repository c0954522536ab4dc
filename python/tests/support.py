"""A daemon of a test's own, and the binaries that the checkout builds.

PEGAFLOW_BIN_DIR names the folder of pegaflowd and libpegaflow.so, else it is the debug folder of
CARGO_TARGET_DIR or of `target`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pegaflow.client import Client, Group, Namespace, Options, Registration

ROOT = Path(__file__).resolve().parent.parent.parent
#: How long anything may take on a busy machine.
SOON_MS = 30_000

_numbers = iter(range(1 << 62))


def binaries() -> Path:
    """Where pegaflowd, pegactl and libpegaflow.so are."""
    named = os.environ.get("PEGAFLOW_BIN_DIR")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    return (Path(named) if named else target / "debug").absolute()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits until the condition holds."""
    end = time.monotonic() + SOON_MS / 1000
    while not condition():
        assert time.monotonic() < end, f"not within {SOON_MS} ms: {what}"
        time.sleep(0.01)


class Daemon:
    """pegaflowd on a node and a socket of its own. Leaving it removes what it kept."""

    def __init__(self, *arguments: str) -> None:
        self.node = f"python-{os.getpid()}-{next(_numbers)}"
        self.folder = Path(tempfile.mkdtemp(prefix="pegaflow-python-"))
        self.socket = self.folder / "daemon.sock"
        self.log = self.folder / "log"
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it serves."""
        assert self.process is None
        kept = {
            name: value
            for name, value in os.environ.items()
            if name == "PEGAFLOW_SHM_DIR" or not name.startswith(("PEGAFLOW_", "NOTIFY_SOCKET"))
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    binaries() / "pegaflowd",
                    "--node",
                    self.node,
                    "--socket",
                    self.socket,
                    "--pool-size",
                    "64MiB",
                    "--extent-size",
                    "4MiB",
                    "--http",
                    "off",
                    *self.arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=kept,
            )
        eventually(self._answers, f"pegaflowd serves; its log is {self.log}")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"pegaflowd ended:\n{self.log.read_text()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        """Ends it without warning."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ends it as an operator would."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(SOON_MS / 1000)
            self.process = None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It is alive and does nothing meanwhile."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        eventually(
            lambda: all(
                (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                for task in tasks.iterdir()
            ),
            "all threads of the daemon have stopped",
        )
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def leases(self) -> int:
        """How many leases live."""
        told = subprocess.run(
            [binaries() / "pegactl", "--node", self.node, "--json", "status"],
            check=True,
            capture_output=True,
        )
        return int(json.loads(told.stdout)["leases"])

    def options(self) -> Options:
        """How to connect to it."""
        return Options(node=self.node, socket=str(self.socket))

    def client(self) -> Client:
        """A client of it."""
        return Client(self.options())

    def __enter__(self) -> Daemon:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.stop()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder)
        shm = Path(os.environ.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow"))
        shutil.rmtree(shm / self.node, ignore_errors=True)


#: A namespace for tests.
NAMESPACE = Namespace(block_tokens=16, model="test", dtype="float16", hash_algorithm="test")


def worker(
    client: Client, blocks: int = 16, block_bytes: int = 4096
) -> tuple[Registration, memoryview]:
    """A registered single rank with its memory, one segment."""
    memory = client.alloc_host(blocks * block_bytes)
    view = memory.view()
    group = Group.of(view.cast("B", [blocks, block_bytes]))
    registration = client.register_worker(f"test-{next(_numbers)}", NAMESPACE, [group])
    registration.wait_ready(SOON_MS)
    return registration, view


def hashes(count: int, salt: int = 0) -> list[bytes]:
    """Different hashes."""
    return [(salt << 32 | at).to_bytes(32, "little") for at in range(count)]
