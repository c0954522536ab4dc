"""The examples, as a user runs them, with a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.model import write_tokenizer
from tests.vllm.place import SOURCES, Place
from tests.vllm.process import LIMIT_SECONDS, Vllm

#: What an example prints of a run: its name, the tokens loaded so far, and the answer.
LINE = re.compile(r"^(\w+): .*?(\d+)(?:\.0)? tokens loaded.*?: ('.*')$", re.MULTILINE)
#: Further arguments of its engines: compiling takes longer than all of the rest.
MORE = json.dumps({"enforce_eager": True, "dtype": "float32", "block_size": 32})


def told(printed: str) -> list[tuple[str, int, str]]:
    """What an example told of its runs."""
    return [(name, int(loaded), answer) for name, loaded, answer in LINE.findall(printed)]


def run(vllm: Callable[..., Vllm], example: str, place: Place, *what: str) -> str:
    """Runs an example in a process that has imported vLLM already; returns what it printed."""
    write_tokenizer(place.model)
    engine = vllm("-".join([example, *what]), multiprocess=True)
    arguments = [str(place.model), *what, MORE]
    path = str(SOURCES / "examples" / example)
    printed = str(engine.call("script", path=path, arguments=arguments)["printed"])
    engine.stop()
    return printed


@pytest.mark.usefixtures("daemon")
def test_the_second_run_of_the_offline_example_loads_what_the_first_saved(
    place: Place, vllm: Callable[..., Vllm]
) -> None:
    (first, cold, answer), (second, warm, again) = told(run(vllm, "offline.py", place))
    assert (first, second, cold) == ("first", "second", 0)
    assert warm >= 1000
    assert answer == again


def test_what_the_save_only_example_saves_beside_another_connector_is_loaded_later(
    place: Place, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    ((_, cold, answer),) = told(run(vllm, "save_only.py", place, "save"))
    assert cold == 0
    daemon.settle()
    assert daemon.counter("requests", op="query") == 0
    ((_, warm, again),) = told(run(vllm, "save_only.py", place, "load"))
    assert warm >= 1000
    assert answer == again


@pytest.mark.usefixtures("daemon")
def test_a_replica_loads_what_the_other_one_saved(place: Place) -> None:
    write_tokenizer(place.model)
    # Its replicas are spawned, so it gains nothing from what is imported already.
    ended = subprocess.run(
        [place.python, str(SOURCES / "examples" / "two_replicas.py"), str(place.model), MORE],
        cwd=place.folder,
        env=place.environment(multiprocess=False),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    (first, cold, answer), (second, warm, again) = told(ended.stdout)
    assert (first, second, cold) == ("first", "second", 0)
    assert warm >= 1000
    assert answer == again
