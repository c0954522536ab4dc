"""A tiny random checkpoint whose greedy output depends on every byte of the KV cache.

vLLM's own dummy weights (about 1e-3) give nearly constant logits, behind which a wrong KV cache
hides. Here what attention reads outweighs a token's own embedding, so that one other token anywhere
in the prompt gives another continuation. `test_harness.py` proves it.

`python -m tests.vllm.model FOLDER` writes one.
"""

from __future__ import annotations

import json
import math
import random
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 2048
MAX_TOKENS = 4096
LAYERS = 2
HIDDEN = 256
INTERMEDIATE = 512
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 64

#: Standard deviations of matrices: 0.08 but for these.
SPREADS = {"embed_tokens": 0.1, "o_proj": 0.5, "down_proj": 0.05}
#: Values of vectors: 1 but for these, which make attention prefer some tokens to others, and let
#: recurrent state remember its first tokens.
SCALES = {"q_norm": 1.5, "k_norm": 1.5, "A_log": -4.0, "dt_bias": -1.0}

CONFIG: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_TOKENS,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{at}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"{at}.self_attn.k_norm.weight": (HEAD_DIM,),
            f"{at}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return tensors


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint says of itself, and its tensors by name."""

    config: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    #: What the model adds to the scales of its norms.
    norm_offset: float = 0.0


#: The usual one: full attention in all layers.
DENSE = Architecture(CONFIG, shapes())


def write(folder: Path, seed: int = 0, architecture: Architecture = DENSE) -> None:
    """Writes configuration and weights (in the safetensors format) into `folder`."""
    generator = random.Random(seed)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = array("f")
    for name, shape in architecture.shapes.items():
        part = name.removesuffix(".weight").split(".")[-1]
        begin = len(data) * data.itemsize
        if len(shape) == 1:
            data.extend([SCALES.get(part, 1.0) - architecture.norm_offset] * shape[0])
        else:
            spread = SPREADS.get(part, 0.08)
            data.extend(generator.gauss(0.0, spread) for _ in range(math.prod(shape)))
        end = len(data) * data.itemsize
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    if sys.byteorder != "little":
        data.byteswap()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    said = json.dumps(architecture.config, indent=1)
    (folder / "config.json").write_text(said + "\n", encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data.tofile(file)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with a word for each token, for servers, which want one."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "bos_token": "w1"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
