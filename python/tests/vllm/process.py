"""A vLLM in a process of its own: started, told what to do, read, killed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.vllm.template import Template

#: Nothing here measures time. The limit only ends a test whose engine hangs, on any machine.
LIMIT_SECONDS = 600.0


class EngineError(Exception):
    """The engine failed a command, or its process ended."""


@dataclass(frozen=True)
class Outcome:
    """What became of the prompts of one run, in their order."""

    #: Generated tokens; those of an aborted request are left out.
    tokens: list[list[int]]
    #: Why each ended: `length`, `abort`, `error`.
    reasons: list[str]
    #: Tokens of each prompt that were not computed: vLLM's own cache and the connector's.
    cached: list[int | None]
    #: How far, in log-probability, each token was ahead of the second best, if asked for.
    leads: list[list[float]]

    @property
    def failed(self) -> list[int]:
        """Numbers of the requests that neither ran to their length nor were aborted."""
        return [at for at, reason in enumerate(self.reasons) if reason not in ("length", "abort")]


class Surroundings(Protocol):
    """What an engine process is started in; `Place` is one."""

    @property
    def folder(self) -> Path: ...

    @property
    def python(self) -> str: ...

    @property
    def engine(self) -> dict[str, Any]: ...

    def environment(self, *, multiprocess: bool) -> dict[str, str]: ...


class Vllm:
    """One process with one engine at a time, and vLLM's own processes below it."""

    #: What the process runs.
    MODULE = "tests.vllm.engine"
    #: No command takes so long.
    LIMIT_SECONDS = LIMIT_SECONDS
    #: An engine that has not stopped by itself then is killed.
    STOP_SECONDS = 120.0

    def __init__(
        self,
        place: Surroundings,
        name: str,
        *,
        multiprocess: bool,
        template: Template | None = None,
        **environment: str,
    ) -> None:
        self.place = place
        self.log_path = place.folder / f"{name}.log"
        self.popen: subprocess.Popen[bytes] | None = None
        their_commands, commands = os.pipe()
        replies, their_replies = os.pipe()
        variables = place.environment(multiprocess=multiprocess) | environment
        with self.log_path.open("ab") as log:
            if template is not None:
                self.pid = template.fork(
                    place.folder, variables, their_commands, their_replies, log.fileno()
                )
            else:
                self.popen = subprocess.Popen(
                    [place.python, "-m", self.MODULE, str(their_replies)],
                    cwd=place.folder,
                    env=variables,
                    stdin=their_commands,
                    stdout=log,
                    stderr=log,
                    pass_fds=[their_replies],
                    start_new_session=True,
                )
                self.pid = self.popen.pid
        # A forked engine is no child of ours to wait for.
        self.pidfd = os.pidfd_open(self.pid) if self.popen is None else None
        # Our copies of its ends would keep both of us waiting for each other for ever.
        os.close(their_commands)
        os.close(their_replies)
        self.commands = os.fdopen(commands, "w", encoding="utf-8")
        self.replies = os.fdopen(replies, encoding="utf-8")
        self.ended = False

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def events(self, command: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Sends one command and yields what comes back, the answer last."""
        line = json.dumps({"command": command, "arguments": arguments})
        try:
            self.commands.write(line + "\n")
            self.commands.flush()
        except BrokenPipeError:
            raise self.error(command, "its process has ended") from None
        # A process that hangs is killed, and the read below then finds the end of the pipe.
        with Deadline(self):
            for reply in map(json.loads, self.replies):
                if reply["event"] == "failed":
                    raise self.error(command, reply["error"])
                yield reply
                if reply["event"] == "done":
                    return
        raise self.error(command, "its process ended, or hung and was killed")

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        *_, answer = self.events(command, **arguments)
        return answer

    def error(self, command: str, what: str) -> EngineError:
        tail = "\n".join(self.log().splitlines()[-60:])
        return EngineError(f"{command}: {what}\n--- end of {self.log_path.name}\n{tail}")

    def open(self, **arguments: Any) -> None:
        """Makes an engine. What is not named comes from `Place.engine`."""
        self.call("open", arguments=self.place.engine | arguments)

    def close(self) -> None:
        """Drops the engine."""
        self.call("close")

    def run(self, prompts: list[list[int]], **arguments: Any) -> Outcome:
        """Runs prompts to their ends."""
        return outcome(self.call("run", prompts=prompts, **arguments))

    def reset(self) -> bool:
        """Empties vLLM's own prefix cache; false if blocks were still in use."""
        return bool(self.call("reset")["reset"])

    def metrics(self) -> dict[str, float]:
        """vLLM's metrics, summed over their labels."""
        metrics: dict[str, float] = self.call("metrics")["metrics"]
        return metrics

    def log(self) -> str:
        """What vLLM and the connector have written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """Ends the process the way a service is stopped, and waits for all below it."""
        if self.ended:
            return
        with contextlib.suppress(BrokenPipeError):
            self.commands.close()
        self.wait(self.STOP_SECONDS)
        self.kill()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when the process has ended, or after so many seconds."""
        if self.pidfd is not None:
            select.select([self.pidfd], [], [], seconds)
        elif self.popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to the process and to all that it has started."""
        if self.ended:
            return
        self.ended = True
        self.signal_all()
        self.wait()
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self.commands.close()

    def signal_all(self) -> None:
        """SIGKILL to the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Deadline:
    """Kills the engine's processes when a command takes longer than any command may."""

    def __init__(self, engine: Vllm) -> None:
        self.timer = threading.Timer(engine.LIMIT_SECONDS, engine.signal_all)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


def outcome(answer: dict[str, Any]) -> Outcome:
    """The typed form of an answer to `run`."""
    fields = ("tokens", "reasons", "cached", "leads")
    return Outcome(**{name: answer[name] for name in fields})


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log."""
    if not path.exists():
        return "(no log)"
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
