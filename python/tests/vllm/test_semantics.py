"""What a hit needs of each kind of cache, against vLLM's own managers of those."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.vllm.place import SOURCES

TOKENS = 16


def disagreements() -> list[str]:
    """Where the connector and vLLM differ; runs where vLLM can be imported."""
    import random
    from types import SimpleNamespace

    import torch
    from vllm.v1.core import single_type_kv_cache_manager as managers
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    from pegaflow.connector import compat
    from pegaflow.connector.lookup import Asked, ends_of

    heads: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    state: dict[str, Any] = {"shapes": ((4,),), "dtypes": (torch.float32,)}
    full = FullAttentionSpec(block_size=TOKENS, **heads)
    kinds: list[tuple[Any, Any]] = [
        (managers.FullAttentionManager, full),
        *(
            (managers.SlidingWindowManager, SlidingWindowSpec(TOKENS, sliding_window=wide, **heads))
            for wide in (2, 17, 18, 64, 200)
        ),
        *(
            (
                managers.ChunkedLocalAttentionManager,
                ChunkedLocalAttentionSpec(TOKENS, attention_chunk_size=size, **heads),
            )
            for size in (16, 32, 48, 40, 1000)
        ),
        (managers.MambaManager, MambaSpec(TOKENS, mamba_cache_mode="align", **state)),
    ]
    config = SimpleNamespace(parallel_config=SimpleNamespace())
    compat.hash_tokens = lambda *_: TOKENS
    found = []
    generator = random.Random(1)
    for manager, spec in kinds:
        # As the second group, so that it is one that is asked for its blocks.
        said = SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=one) for one in (full, spec)]
        )
        group = compat.cache_groups(config, said)[1]
        own = manager.__new__(manager)
        own.kv_cache_spec, own.block_size = spec, TOKENS
        for name in ("sliding_window", "attention_chunk_size", "extra_retained_tokens"):
            if hasattr(spec, name):
                setattr(own, name, getattr(spec, name))
        for _ in range(40):
            present = [generator.random() < 0.8 for _ in range(generator.randrange(1, 20))]
            pool = BlockPool(64, enable_caching=True, hash_block_size=TOKENS)
            hashes = [bytes([at]) * 32 for at in range(len(present))]
            for at, there in enumerate(present):
                if there:
                    key = make_block_hash_with_group_id(hashes[at], 1)
                    pool.cached_block_hash_to_block.insert(key, pool.blocks[at + 1])
            bits = sum(1 << at for at, there in enumerate(present) if there)
            bitmap: Any = SimpleNamespace(bitmap=SimpleNamespace(to_int=lambda bits=bits: bits))
            asked = Asked(0, len(present) * TOKENS, {}, 0.0, answers={1: bitmap})
            ends = ends_of(group, asked)
            for end in range(1, len(present) + 1):
                _, length = manager.find_longest_cache_hit(
                    block_hashes=hashes,
                    max_length=end * TOKENS,
                    kv_cache_group_ids=[1],
                    block_pool=pool,
                    kv_cache_spec=spec,
                    drop_eagle_block=False,
                    alignment_tokens=TOKENS,
                )
                # vLLM allocates nothing before this block.
                skipped = own.get_num_skipped_tokens(end * TOKENS) // TOKENS
                if (ends[end] == "1") != (length == end * TOKENS):
                    found.append(f"{spec}: a hit of {end} blocks with {present}")
                if group.needed_from(end) != skipped:
                    found.append(f"{spec}: {end} blocks need those from {skipped} on")
    return found


def test_what_a_hit_needs_is_what_vllms_own_managers_say(python: str) -> None:
    ended = subprocess.run(
        [python, "-m", "tests.vllm.test_semantics"],
        cwd=SOURCES,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == []


if __name__ == "__main__":
    print(json.dumps(disagreements()[:20]), file=sys.stdout)
