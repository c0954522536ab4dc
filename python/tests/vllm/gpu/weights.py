"""Weights for a model that was loaded without any. A module of its own: workers import it."""

from __future__ import annotations

from typing import Any

#: Standard deviations of what matrices make of inputs of deviation 1, where they are not 1.3.
SPREADS = {"o_proj": 6.0, "down_proj": 0.3}
#: The same of keys and queries: a token looks at few of the thousands before it.
SHARPNESS = 2.5
KEYS_AND_QUERIES = ("q_proj", "k_proj", "qkv_proj", "kv_b_proj", "kv_a_proj_with_mqa")


def randomise_model(model: Any) -> int:
    """Runs in vLLM's worker. What attention reads outweighs the rest, and it reads few tokens, so
    that an answer depends on each block of the cache."""
    import torch

    names = {name.split(".")[-2] for name, _ in model.named_parameters()}
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            part = name.split(".")[-2]
            if weight.dim() < 2:
                weight.fill_(SHARPNESS if part in ("q_norm", "k_norm") else 1.0)
                continue
            generator = torch.Generator(device=weight.device).manual_seed(number)
            spread = SPREADS.get(part, 1.3)
            if part in KEYS_AND_QUERIES and "q_norm" not in names:
                spread = SHARPNESS
            if "embed" in name:
                weight.normal_(0.0, 0.1, generator=generator)
            else:
                weight.normal_(0.0, spread / weight.shape[-1] ** 0.5, generator=generator)
        # MLA computes with products of its weights that were taken when it was loaded.
        for module in model.modules():
            if hasattr(module, "W_UV"):
                module.process_weights_after_loading(next(model.parameters()).dtype)
    return sum(weight.numel() for weight in model.parameters())
