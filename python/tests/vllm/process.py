"""A vLLM in a process of its own: started, told what to do, read, killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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

    def __init__(
        self, place: Surroundings, name: str, *, multiprocess: bool, **environment: str
    ) -> None:
        self.log_path = place.folder / f"{name}.log"
        ours, theirs = os.pipe()
        # The pipe's end and the log are the child's alone once it runs.
        with self.log_path.open("ab") as log:
            self.child = subprocess.Popen(
                [place.python, "-m", self.MODULE, str(theirs)],
                cwd=place.folder,
                env=place.environment(multiprocess=multiprocess) | environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[theirs],
                start_new_session=True,
                text=True,
            )
        os.close(theirs)
        self.replies = os.fdopen(ours, encoding="utf-8")
        self.place = place
        self.ended = False

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def events(self, command: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Sends one command and yields what comes back, the answer last."""
        assert self.child.stdin is not None
        line = json.dumps({"command": command, "arguments": arguments})
        try:
            self.child.stdin.write(line + "\n")
            self.child.stdin.flush()
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
        self.ended = True
        assert self.child.stdin is not None
        try:
            self.child.stdin.close()
            self.child.wait(LIMIT_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the process and to all that it has started."""
        self.ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self.replies.close()


class Deadline:
    """Kills the engine's processes when a command takes longer than any command may."""

    def __init__(self, engine: Vllm) -> None:
        self.timer = threading.Timer(
            engine.LIMIT_SECONDS, os.killpg, (engine.child.pid, signal.SIGKILL)
        )

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
