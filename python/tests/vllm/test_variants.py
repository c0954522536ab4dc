"""The usual model with something that changes its KV: a quantised cache, an adapter.

What is compared was computed in the same shapes: answers from the connector with answers from
vLLM's own cache, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vllm.daemon import Daemon
from tests.vllm.model import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, Architecture, write
from tests.vllm.place import connector
from tests.vllm.process import Vllm
from tests.vllm.prompts import families, reusable

EXTERNAL = "vllm:external_prefix_cache_hits"
RANK = 8


def answers_of_both_caches(
    engine: Vllm, daemon: Daemon, prompt: list[int], **arguments: Any
) -> tuple[list[int], list[int], float]:
    """What a prompt that is cached is answered from vLLM's own cache, and from the connector; and
    how many tokens were loaded for the latter."""
    engine.run([prompt], **arguments)
    (own,) = engine.run([prompt], **arguments).tokens
    daemon.settle()
    assert engine.reset()
    before = engine.metrics()[EXTERNAL]
    (loaded,) = engine.run([prompt], **arguments).tokens
    return own, loaded, engine.metrics()[EXTERNAL] - before


def test_a_quantised_cache_is_loaded_bit_by_bit(daemon: Daemon, vllm: Callable[..., Vllm]) -> None:
    prompts = families(4, seed=70, each=1)
    engine = vllm("fp8")
    engine.open(kv_transfer_config=connector(), kv_cache_dtype="fp8")
    for prompt in prompts:
        own, loaded, tokens = answers_of_both_caches(engine, daemon, prompt)
        assert loaded == own
        assert tokens == reusable(prompt, 32)
    engine.close()
    # The same model with another cache finds none of it.
    engine.open(kv_transfer_config=connector())
    engine.run(prompts)
    assert engine.metrics()[EXTERNAL] == 0


def write_adapter(folder: Path, seed: int) -> None:
    """An adapter of keys and values, large enough to change every answer."""
    sizes = {"k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    tensors = {}
    for layer in range(LAYERS):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = (RANK, HIDDEN)
            tensors[f"{at}.lora_B.weight"] = (size, RANK)
    said = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(sizes),
        "bias": "none",
    }
    write(folder, seed, Architecture(said, tensors))
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def test_adapters_share_nothing_and_are_loaded_as_they_were_saved(
    daemon: Daemon, vllm: Callable[..., Vllm], tmp_path: Path
) -> None:
    for seed in (1, 2):
        write_adapter(tmp_path / f"adapter-{seed}", seed)
    prompt = families(1, seed=71, prefix=(200, 200))[0]
    engine = vllm("lora")
    arguments = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    engine.open(kv_transfer_config=connector(), **arguments)
    answers = []
    for lora in (None, ["one", 1, "adapter-1"], ["two", 2, "adapter-2"]):
        chosen = lora and [*lora[:2], str(tmp_path / str(lora[2]))]
        own, loaded, tokens = answers_of_both_caches(engine, daemon, prompt, lora=chosen)
        assert loaded == own
        assert tokens == reusable(prompt, 32)
        answers.append(json.dumps(own))
    assert len(set(answers)) == 3
    # Other weights behind the same name, number and path, in the next process.
    engine.close()
    write_adapter(tmp_path / "adapter-1", 3)
    engine.open(kv_transfer_config=connector(), **arguments)
    engine.run([prompt], lora=["one", 1, str(tmp_path / "adapter-1")])
    assert engine.metrics()[EXTERNAL] == 0
