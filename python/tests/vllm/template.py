"""A process that has imported vLLM and forks engine processes: importing takes 10 s, forking none.

It never makes an engine itself and has one thread, so a fork is what a fresh process would be after
the same imports. Each engine process gets its own environment, folder, log and process group.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.vllm.place import Place

#: One request for a process: its environment and folder.
LONGEST = 1 << 20


class Template:
    """The tests' end."""

    def __init__(self, place: Place) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, (place.folder / "template.log").open("ab") as log:
            self.child = subprocess.Popen(
                [place.python, "-m", "tests.vllm.template", str(theirs.fileno())],
                cwd=place.folder,
                env=place.environment(multiprocess=False),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        self.socket = ours

    def fork(
        self, folder: Path, environment: dict[str, str], commands: int, replies: int, log: int
    ) -> int:
        """A new engine process with these descriptors; returns its id."""
        request = json.dumps({"folder": str(folder), "environment": environment}).encode()
        assert len(request) < LONGEST
        socket.send_fds(self.socket, [request], [commands, replies, log])
        answer = self.socket.recv(LONGEST)
        if not answer:
            raise RuntimeError("vLLM cannot be imported: see template.log")
        return int(answer)

    def stop(self) -> None:
        """Engine processes live on."""
        self.socket.close()
        self.child.wait()


def become_engine(request: dict[str, object], commands: int, replies: int, log: int) -> None:
    """In the forked process."""
    from tests.vllm.engine import Server, serve_on

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    environment = request["environment"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(request["folder"]))
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)
    serve_on(Server, commands, replies)


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    # Nobody waits for the forked processes here: the tests watch them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for module in ("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"):
        importlib.import_module(module)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 3)
        if not message:
            return
        child = os.fork()
        if child == 0:
            requests.close()
            become_engine(json.loads(message), *descriptors)
            sys.stdout.flush()
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(child).encode())


if __name__ == "__main__":
    main()
