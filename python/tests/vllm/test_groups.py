"""A model with two groups of caches: layers that see all, and layers that see a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.model import write
from tests.vllm.place import Place, connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences
from tests.vllm.template import Template

EXTERNAL = "vllm:external_prefix_cache_hits"


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A hybrid model."""
    folder = tmp_path_factory.mktemp("windowed")
    write(folder, windowed=True)
    return str(folder)


@pytest.fixture(scope="module")
def right(outside: Place, template: Template, windowed: str) -> Iterator[Reference]:
    """Tells what is right for it."""
    place = replace(outside, engine=outside.engine | {"model": windowed})
    with Vllm(place, "windowed", multiprocess=False, template=template) as engine:
        yield Reference(engine)


def test_windows_and_full_attention_are_loaded_alike_after_a_restart(
    right: Reference, windowed: str, daemon: Daemon, vllm: Callable[..., Vllm]
) -> None:
    prompts = families(12, seed=60, each=3)
    wanted = right.outputs(prompts)
    arguments = {
        "model": windowed,
        "kv_transfer_config": connector(),
        "max_num_batched_tokens": 240,
    }
    cold = vllm("cold")
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
