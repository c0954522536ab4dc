"""The harness itself: a comparison that cannot fail proves nothing."""

from __future__ import annotations

from collections.abc import Callable

from tests.vllm.process import Vllm
from tests.vllm.prompts import families
from tests.vllm.reference import Reference, differences


def test_outputs_depend_on_every_block_of_the_prompt(reference: Reference) -> None:
    prompt = families(1, seed=1, prefix=(320, 320), suffix=(9, 9))[0]
    # One block at a time has its tokens in another order.
    others = [
        prompt[:at] + prompt[at : at + 32][::-1] + prompt[at + 32 :] for at in range(0, 320, 32)
    ]
    wanted = reference.outputs([prompt] * len(others))
    assert differences(reference.outputs(others), wanted) == list(range(len(others)))


def test_batches_chunks_and_vllms_own_cache_change_no_output(
    reference: Reference, vllm: Callable[..., Vllm]
) -> None:
    prompts = families(50, seed=2)
    wanted = reference.outputs(prompts)
    engine = vllm("plain")
    engine.open(max_num_batched_tokens=96, max_num_seqs=16, max_model_len=1024)
    assert differences(engine.run(prompts).tokens, wanted) == []
    assert differences(engine.run(prompts).tokens, wanted) == []
    metrics = engine.metrics()
    assert metrics["vllm:prefix_cache_hits"] > 0
    assert metrics["vllm:external_prefix_cache_hits"] == 0
