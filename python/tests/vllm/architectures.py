"""Architectures beside the usual one, each with another kind of cache."""

from __future__ import annotations

from tests.vllm.model import (
    CONFIG,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    Architecture,
    shapes,
)

#: What all of them say.
_COMMON = {
    key: CONFIG[key]
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rope_theta",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
    )
}

_WINDOWED_LAYERS = ("sliding_attention", "full_attention") * 2


def _of_layer(layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer of the usual model."""
    return {
        name.replace("layers.0", f"layers.{layer}"): shape
        for name, shape in shapes().items()
        if "layers.0" in name
    }


def _windowed() -> dict[str, tuple[int, ...]]:
    # Its output is that of its embedding: there is no lm_head.
    tensors = {name: shapes()[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for layer in range(len(_WINDOWED_LAYERS)):
        tensors |= _of_layer(layer) | {
            f"model.layers.{layer}.{norm}.weight": (HIDDEN,)
            for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        }
    return tensors


#: vLLM has one group of caches for its windows (of 80 tokens) and one for full attention.
WINDOWED = Architecture(
    _COMMON
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": len(_WINDOWED_LAYERS),
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "layer_types": list(_WINDOWED_LAYERS),
        "sliding_window": 80,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    },
    _windowed(),
    norm_offset=1.0,
)

#: Of each layer: a state ("M"), attention ("*"), or neither ("-").
_RECURRENT_LAYERS = "M*-M*-"
_STATE_HEADS = 8
_STATE_HEAD_DIM = 32
_STATE_SIZE = 16
_CONV_TOKENS = 4


def _recurrent() -> dict[str, tuple[int, ...]]:
    inner = _STATE_HEADS * _STATE_HEAD_DIM
    wide = inner + 2 * _STATE_SIZE
    kinds: dict[str, dict[str, tuple[int, ...]]] = {
        "M": {
            "in_proj.weight": (inner + wide + _STATE_HEADS, HIDDEN),
            "conv1d.weight": (wide, 1, _CONV_TOKENS),
            "conv1d.bias": (wide,),
            "A_log": (_STATE_HEADS,),
            "D": (_STATE_HEADS,),
            "dt_bias": (_STATE_HEADS,),
            "norm.weight": (inner,),
            "out_proj.weight": (HIDDEN, inner),
        },
        "*": {
            "q_proj.weight": (HIDDEN, HIDDEN),
            "k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "o_proj.weight": (HIDDEN, HIDDEN),
        },
        "-": {
            "up_proj.weight": (INTERMEDIATE, HIDDEN),
            "down_proj.weight": (HIDDEN, INTERMEDIATE),
        },
    }
    tensors = {
        "backbone.embeddings.weight": shapes()["model.embed_tokens.weight"],
        "backbone.norm_f.weight": (HIDDEN,),
        "lm_head.weight": shapes()["lm_head.weight"],
    }
    for layer, kind in enumerate(_RECURRENT_LAYERS):
        at = f"backbone.layers.{layer}"
        tensors[f"{at}.norm.weight"] = (HIDDEN,)
        tensors |= {f"{at}.mixer.{name}": shape for name, shape in kinds[kind].items()}
    return tensors


#: Layers of "Mamba 2" state beside layers of full attention.
RECURRENT = Architecture(
    _COMMON
    | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "num_hidden_layers": len(_RECURRENT_LAYERS),
        "hybrid_override_pattern": _RECURRENT_LAYERS,
        "head_dim": HEAD_DIM,
        "mamba_num_heads": _STATE_HEADS,
        "mamba_head_dim": _STATE_HEAD_DIM,
        "ssm_state_size": _STATE_SIZE,
        "n_groups": 1,
        "conv_kernel": _CONV_TOKENS,
        "chunk_size": 64,
        "expand": 1,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    _recurrent(),
)
