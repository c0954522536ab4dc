"""Fixtures: the model, places, and what a vLLM without a connector answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.model import write
from tests.vllm.place import PYTHON, Place
from tests.vllm.process import Vllm
from tests.vllm.reference import Reference
from tests.vllm.template import Template

#: Usual arguments of an engine. In 32-bit floats the order in which a batch adds numbers up changes
#: a logit by about 1e-6, and the margins of the reference (see `reference.py`) are far above that:
#: outputs are then the same however prompts are cut and batched. In bfloat16 they need not be.
ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 64,
    "enforce_eager": True,
    "block_size": 32,
    "num_gpu_blocks_override": 600,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
    "seed": 0,
}


@pytest.fixture(scope="session")
def python() -> str:
    """vLLM's Python."""
    path = os.environ.get(PYTHON)
    if path is None:
        pytest.skip(f"no vLLM: {PYTHON} is not set (make test-vllm sets it)")
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    write(folder)
    return folder


@pytest.fixture(scope="session")
def outside(python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place of no test, without a daemon."""
    folder = tmp_path_factory.mktemp("outside")
    return Place(folder=folder, model=model, python=python, engine=ENGINE | {"model": str(model)})


@pytest.fixture(scope="session")
def template(outside: Place) -> Iterator[Template]:
    """What engine processes are forked from."""
    template = Template(outside)
    yield template
    template.stop()


@pytest.fixture(scope="session")
def reference(outside: Place, template: Template) -> Iterator[Reference]:
    """A vLLM without a connector, which tells what is right."""
    with Vllm(outside, "reference", multiprocess=False, template=template) as engine:
        yield Reference(engine)


@pytest.fixture
def place(python: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """A folder, a node name and a socket of this test's own."""
    node = f"vllm-{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**8}"
    return Place(
        folder=tmp_path,
        model=model,
        python=python,
        node=node,
        engine=ENGINE | {"model": str(model)},
    )


@pytest.fixture
def daemon(place: Place) -> Iterator[Daemon]:
    """A daemon that serves."""
    with Daemon(place) as daemon:
        yield daemon.start()


@pytest.fixture
def vllm(place: Place, template: Template) -> Iterator[Callable[..., Vllm]]:
    """Starts vLLM processes, which end with the test. `vllm(name, multiprocess=...)`."""
    started: list[Vllm] = []

    def start(name: str, *, multiprocess: bool = False, **environment: str) -> Vllm:
        engine = Vllm(place, name, multiprocess=multiprocess, template=template, **environment)
        started.append(engine)
        return engine

    yield start
    for engine in reversed(started):
        engine.stop()
