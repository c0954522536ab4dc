"""Answers from the connector against those from vLLM's own cache, on GPUs, in many shapes: layouts,
kinds of cache, allocators, draft models, ranks.

Each variant has an engine, its prompts computed, answered from vLLM's own cache, loaded, and loaded
once more by another process. What is compared was computed in the same shapes, so every token must
agree. Other tokens in one block in the middle of a prompt must give another answer, or a wrong
cache could hide behind it.

    python -m tests.vllm.gpu.variants --pack FOLDER [--only NAME ...] [--jobs 6]
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.vllm.gpu.answers import LOWEST, altered, differing
from tests.vllm.gpu.setups import SHAPE, Settings, Setup, command_line, daemon, log_folder
from tests.vllm.place import connector
from tests.vllm.process import Vllm

VOCABULARY = 32_000
DENSE = SHAPE | {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
#: Each rank of two has the same head: its tokens are spread over them.
ONE_HEAD = DENSE | {"num_key_value_heads": 1}
LLAMA = {
    key: value for key, value in DENSE.items() if key not in ("architectures", "model_type")
} | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
#: A latent of 512 values and 64 of position for each token; no experts.
LATENT = {
    key: DENSE[key]
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
    )
} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    # All layers before the first one with experts.
    "n_routed_experts": 4,
    "first_k_dense_replace": 6,
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 2,
}
DRAFT = LLAMA | {"num_hidden_layers": 1}


@dataclass(frozen=True)
class Variant:
    """An engine unlike the usual one."""

    name: str
    model: dict[str, Any] = field(default_factory=lambda: DENSE)
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    #: Configuration of a draft model, whose folder is put into `speculative_config`.
    draft: dict[str, Any] | None = None
    gpus: int = 1
    runner: int | None = None


def ranks(name: str, model: dict[str, Any], **sizes: int) -> Variant:
    """Two ranks, each in a process and on a GPU of its own."""
    arguments = {"distributed_executor_backend": "mp", "disable_custom_all_reduce": True}
    return Variant(name, model, arguments | sizes, gpus=2)


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
VARIANTS = (
    Variant("dense"),
    Variant("cross-layer", runner=1),
    Variant("hnd", environment={"VLLM_KV_CACHE_LAYOUT": "HND"}),
    Variant("blocks-of-64", arguments={"block_size": 64}),
    Variant("fp8", arguments={"kv_cache_dtype": "fp8"}),
    Variant("fp8-cross-layer", arguments={"kv_cache_dtype": "fp8"}, runner=1),
    Variant("latent", LATENT),
    Variant("drafts-of-ngrams", arguments={"speculative_config": NGRAM}),
    Variant(
        "drafts-of-eagle",
        LLAMA,
        {"speculative_config": {"method": "eagle", "num_speculative_tokens": 2}},
        draft=DRAFT,
    ),
    ranks("tensor-parallel", DENSE, tensor_parallel_size=2),
    ranks("pipeline-parallel", DENSE, pipeline_parallel_size=2),
    ranks("context-parallel", ONE_HEAD, tensor_parallel_size=2, decode_context_parallel_size=2),
    ranks("latent-tensor-parallel", LATENT, tensor_parallel_size=2),
    ranks(
        "latent-context-parallel", LATENT, tensor_parallel_size=2, decode_context_parallel_size=2
    ),
)


@dataclass(frozen=True)
class Shape(Setup):
    """A variant on its GPUs, with the connector."""

    variant: Variant = field(default_factory=lambda: VARIANTS[0])
    gpus: tuple[int, ...] = (0,)

    @property
    def folder(self) -> Path:
        return self.settings.folder / self.variant.name

    @property
    def engine(self) -> dict[str, Any]:
        usual = super().engine | self.variant.arguments
        usual |= {"max_model_len": 8192, "max_num_batched_tokens": 4096}
        if self.variant.draft is not None:
            drafts = usual["speculative_config"] | {"model": str(self.folder / "draft")}
            usual["speculative_config"] = drafts
        return usual

    def environment(self, *, multiprocess: bool) -> dict[str, str]:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}
        socket = {"PEGAFLOW_SOCKET": str(self.settings.folder / "pegaflow.sock")}
        usual = super().environment(multiprocess=multiprocess)
        return usual | self.variant.environment | visible | socket

    def write(self) -> None:
        """The configurations of its models."""
        models = {"model": self.variant.model, "draft": self.variant.draft}
        for name, config in models.items():
            if config is not None:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                text = json.dumps(config, indent=1)
                (self.folder / name / "config.json").write_text(text, encoding="utf-8")


def prompts() -> list[list[int]]:
    """Some that share their beginnings, of one block to several steps."""
    generator = random.Random(23)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(LOWEST, VOCABULARY) for _ in range(count)]

    shared = tokens(700)
    return [tokens(150), shared + tokens(37), shared + tokens(411), tokens(2049), tokens(5003)]


def check(shape: Shape) -> dict[str, Any]:
    """Computed, from vLLM's own cache, loaded, and loaded by the next process."""
    asked = prompts()

    def answers(engine: Vllm) -> tuple[list[list[int]], list[int]]:
        outcomes = [engine.run([prompt], max_tokens=12) for prompt in asked]
        return [one.tokens[0] for one in outcomes], [one.cached[0] or 0 for one in outcomes]

    with shape.start() as engine:
        cold, _ = answers(engine)
        own, own_cached = answers(engine)
        # Nothing is cached under this salt: computed in the same shapes as the first answers.
        others = [
            engine.run([altered(prompt, VOCABULARY)], max_tokens=12, cache_salt="altered").tokens[0]
            for prompt in asked
        ]
        settled = engine.call("settle")["settled"]
        loaded, loaded_cached = answers(engine)
        engine.call("settle")
    with shape.start() as engine:
        restarted, restarted_cached = answers(engine)
        engine.call("settle")
    return {
        "prompts": len(asked),
        "settled": settled,
        "cold_against_own": differing(cold, own),
        "loaded_differs": differing(loaded, own),
        "restarted_differs": differing(restarted, own),
        "own_cached": own_cached,
        "loaded_cached": loaded_cached,
        "restarted_cached": restarted_cached,
        "altered_differs": differing(cold, others),
    }


def is_right(figures: dict[str, Any]) -> bool:
    """Every token agrees, and everything was loaded that could be."""
    own = figures["own_cached"]
    return (
        figures["settled"]
        and not figures["loaded_differs"]
        and not figures["restarted_differs"]
        and min(own) > 0
        and figures["loaded_cached"] == own
        and figures["restarted_cached"] == own
        and figures["altered_differs"] == figures["prompts"]
    )


class Gpus:
    """Those that variants are tried on. Several share one; one that wants two has the first two."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free: SimpleQueue[int] = SimpleQueue()

    @contextmanager
    def of(self, variant: Variant) -> Iterator[tuple[int, ...]]:
        if variant.gpus > 1:
            yield tuple(range(variant.gpus))
            return
        one = self.free.get()
        try:
            yield (one,)
        finally:
            self.free.put(one)


def gpu_count() -> int:
    import torch

    return int(torch.cuda.device_count())


def main() -> int:
    parser = command_line("compare loaded answers on GPUs in many shapes")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in VARIANTS])
    parser.add_argument("--jobs", type=int, default=6, help="engines alive at the same time")
    options = parser.parse_args()
    folder = log_folder(options)
    settings = Settings(
        pack=options.pack,
        folder=folder,
        python=sys.executable,
        kv_bytes=2 << 30,
        pool_bytes=(1 if options.rehearse else 8) << 30,
        rehearsal=options.rehearse,
    )
    count = 2 if options.rehearse else gpu_count()
    gpus = Gpus(count)
    for job in range(options.jobs):
        gpus.free.put(job % count)
    chosen = [one for one in VARIANTS if options.only is None or one.name in options.only]
    wanted = [one for one in chosen if one.gpus <= count]
    for variant in chosen:
        if variant not in wanted:
            print(f"{variant.name}: SKIPPED, wants {variant.gpus} GPUs, here are {count}")
    began = time.monotonic()
    wrong: list[str] = []

    def attempt(variant: Variant) -> None:
        line: dict[str, Any] = {"variant": variant.name}
        try:
            with gpus.of(variant) as numbers:
                salt = connector(**{"pegaflow.salt": variant.name})
                shape = Shape(
                    variant.name,
                    settings,
                    salt,
                    settings.pack / "ours",
                    multiprocess=variant.gpus > 1,
                    runner=variant.runner,
                    variant=variant,
                    gpus=numbers,
                )
                shape.write()
                line |= check(shape)
                line["right"] = is_right(line)
        except Exception as error:
            traceback.print_exc()
            line |= {"right": False, "failed": str(error)[:3000]}
        if not line["right"]:
            wrong.append(variant.name)
        line["seconds"] = round(time.monotonic() - began, 1)
        print(json.dumps(line), flush=True)

    with daemon(settings), ThreadPoolExecutor(options.jobs) as pool:
        # Those of two processes take longest.
        for one in [pool.submit(attempt, each) for each in sorted(wanted, key=lambda v: -v.gpus)]:
            one.result()
    skipped = len(chosen) - len(wanted)
    print(
        f"{len(wanted)} variants, {skipped} skipped, wrong: {', '.join(sorted(wrong)) or 'none'};"
        f" logs: {folder}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
