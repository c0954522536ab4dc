"""Weights for a model that was loaded without any. A module of its own: workers import it."""

from __future__ import annotations

from typing import Any


def randomise_model(model: Any) -> int:
    """Runs in vLLM's worker. Weights are scaled so that what attention reads outweighs the rest."""
    import torch

    spreads = {"o_proj": 6.0, "down_proj": 1.0}
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            part = name.split(".")[-2]
            if weight.dim() < 2:
                weight.fill_(1.3 if part in ("q_norm", "k_norm") else 1.0)
                continue
            generator = torch.Generator(device=weight.device).manual_seed(number)
            spread = spreads.get(part, 1.3) / weight.shape[-1] ** 0.5
            if "embed" in name:
                spread = 0.1
            weight.normal_(0.0, spread, generator=generator)
        # MLA computes with products of its weights that were taken when it was loaded.
        for module in model.modules():
            if hasattr(module, "W_UV"):
                module.process_weights_after_loading(next(model.parameters()).dtype)
    return sum(weight.numel() for weight in model.parameters())
