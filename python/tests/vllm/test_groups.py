"""Models with several groups of caches: layers that see all beside layers that see a window, or
that have a state in place of a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.vllm.architectures import RECURRENT, WINDOWED
from tests.vllm.daemon import Daemon
from tests.vllm.model import Architecture, write
from tests.vllm.place import Place, connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences
from tests.vllm.template import Template

EXTERNAL = "vllm:external_prefix_cache_hits"

#: And how prompts are cut. With state a piece is a block: for one of a block and a part of the
#: next, vLLM 0.32 has no kernel on CPUs.
MODELS: dict[str, tuple[Architecture, dict[str, int]]] = {
    "windows": (WINDOWED, {"max_num_batched_tokens": 240}),
    "recurrent state": (RECURRENT, {"max_num_batched_tokens": 32, "max_num_seqs": 8}),
}


@pytest.fixture(scope="module", params=MODELS)
def hybrid(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """A hybrid model, as arguments of an engine."""
    folder = tmp_path_factory.mktemp("hybrid")
    architecture, pieces = MODELS[request.param]
    write(folder, architecture=architecture)
    return {"model": str(folder), **pieces}


@pytest.fixture(scope="module")
def right(outside: Place, template: Template, hybrid: dict[str, Any]) -> Iterator[Reference]:
    """Tells what is right for it."""
    place = replace(outside, engine=outside.engine | {"model": hybrid["model"]})
    with Vllm(place, "hybrid", multiprocess=False, template=template) as engine:
        yield Reference(engine)


def test_all_groups_of_a_model_are_loaded_as_far_as_needed_after_a_restart(
    right: Reference, hybrid: dict[str, Any], daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    prompts = families(12, seed=60, each=3)
    wanted = right.outputs(prompts)
    arguments = hybrid | {"kv_transfer_config": connector()}
    # Steps without work end the saves of states.
    cold = vllm("cold", multiprocess=True)
    cold.open(**arguments)
    assert differences(cold.run(prompts).tokens, wanted) == []
    daemon.settle()
    cold.stop()

    warm = vllm("warm")
    warm.open(**arguments)
    for prompt, sure in zip(prompts, wanted, strict=True):
        assert warm.reset()
        before = warm.metrics()[EXTERNAL]
        alone = warm.run([prompt])
        assert differences(alone.tokens, [sure]) == []
        assert warm.metrics()[EXTERNAL] - before == reusable(prompt, 32)
