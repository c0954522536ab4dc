"""A daemon of a test's own, on a node name and a socket that nobody else uses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.vllm.place import PROGRAMS, ROOT, Place
from tests.vllm.process import LIMIT_SECONDS, tail


def program(name: str) -> str:
    """A program under test: from `PEGAFLOW_BIN_DIR`, else from the debug build."""
    folder = Path(os.environ.get(PROGRAMS, ROOT / "target" / "debug"))
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: cargo build --workspace --bins")
    return str(path)


class Daemon:
    """Starts, watches and kills `pegaflowd`."""

    def __init__(self, place: Place, *options: str, pool: str = "256MiB") -> None:
        self.place = place
        #: Tools of the version that the daemon has; another one may not read its files.
        self.tool = program("pegactl")
        self.options = ["--pool-size", pool, "--http", "off", *options]
        self.log_path = place.folder / "daemon.log"
        self.child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shm = Path(os.environ.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow"))
        shutil.rmtree(shm / self.place.node, ignore_errors=True)

    def start(self) -> Daemon:
        """Starts it and returns when it serves."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PEGAFLOW_") or name == "PEGAFLOW_SHM_DIR"
        }
        started = self.log().count(" ready ")
        with self.log_path.open("ab") as log:
            self.child = subprocess.Popen(
                [
                    program("pegaflowd"),
                    "--node",
                    self.place.node,
                    "--socket",
                    str(self.place.socket),
                    *self.options,
                ],
                env=clean,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_for("the daemon to serve", lambda: self.log().count(" ready ") > started)
        return self

    def stop(self) -> None:
        """SIGTERM, and waits."""
        if self.child is not None:
            self.child.terminate()
            self.child.wait(LIMIT_SECONDS)
            self.child = None

    def kill(self) -> None:
        """SIGKILL: no farewell, nothing written back."""
        assert self.child is not None
        self.child.kill()
        self.child.wait()
        self.child = None

    def freeze(self) -> None:
        """SIGSTOP: alive for the kernel, and silent."""
        assert self.child is not None
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.child is not None
        self.child.send_signal(signal.SIGCONT)

    def log(self) -> str:
        if not self.log_path.exists():
            return ""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def pegactl(self, command: str) -> dict[str, Any]:
        """What `pegactl` reads in shared memory."""
        output = subprocess.run(
            [self.tool, "--node", self.place.node, command, "--json"],
            check=True,
            capture_output=True,
            timeout=LIMIT_SECONDS,
        ).stdout
        answer: dict[str, Any] = json.loads(output)
        return answer

    def counter(self, name: str, **labels: str) -> int:
        """One of the daemon's counters, such as `copied_bytes`, summed over what is not named."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for key, value in self.pegactl("metrics")["counters"].items()
            if key.split("{")[0] == f"pegaflow_{name}_total" and all(one in key for one in wanted)
        )

    def sealed(self) -> int:
        """Blocks that can be hit."""
        return int(self.pegactl("cache")["pool"]["blocks_sealed"])

    def settle(self) -> int:
        """Waits until no request is under way and the number of blocks stands still; returns it."""
        seen: list[tuple[int, int]] = []

        def still() -> bool:
            status = self.pegactl("status")
            busy = sum(
                status[what] for what in ("requests_unfinished", "copy_tasks", "blocks_unfinished")
            )
            seen.append((self.sealed(), self.counter("requests")))
            return busy == 0 and len(seen) > 3 and len(set(seen[-3:])) == 1

        self.wait_for("the daemon to become idle", still)
        return seen[-1][0]

    def wait_for(self, what: str, holds: Any) -> None:
        """Waits for something that comes about, with a limit that no machine reaches."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not holds():
            ended = self.child is not None and self.child.poll() is not None
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"waited for {what}\n--- daemon's log\n{tail(self.log_path)}")
            time.sleep(0.1)
