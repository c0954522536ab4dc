"""What vLLM's configuration says about the meaning of a block's bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pegaflow.client import Namespace
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.namespace import HashSeed, facts_text, hash_text
from pegaflow.connector.weights import fingerprint, snapshot_of

#: Keys of a model's configuration that do not change what it computes.
_IDLE_KEYS = ("transformers_version",)

#: Ways of loading that read the same files to the same end.
_USUAL_LOADERS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")

#: What the engine does to images, sounds and videos before the model sees them. vLLM's hashes have
#: what a request says of it, and not what the engine was started with.
_MEDIA = (
    "mm_processor_kwargs",
    "mm_device_do_normalize",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "video_pruning_rate",
    "video_pruning_method",
)

#: Longest prompt up to which vLLM leaves the temperature of Llama 4's attention alone.
_LLAMA4_TUNED_BEYOND = 32768


def namespace_of(
    config: ConnectorConfig,
    vllm_config: Any,
    seed: HashSeed,
    block_tokens: int,
    layout: str,
    groups: Sequence[str],
    release: str | None = None,
) -> Namespace:
    """The namespace of an engine, the same for all its ranks.

    `block_tokens` counts the tokens of one hash, `layout` tells arrangements of equal sizes apart,
    `groups` describes the cache groups; `release` is vLLM's version.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    engine_id = str(vllm_config.kv_transfer_config.engine_id)
    name = config.model or model.model
    return Namespace(
        block_tokens=block_tokens,
        model=facts_text({"model": name}) if len(name.encode()) > 1000 else name,
        dtype=facts_text(
            {
                "model": _plain(model.dtype),
                "cache": _plain(cache.cache_dtype),
                # Scales that each process measures by itself mean nothing to another.
                "scales": engine_id if getattr(cache, "calculate_kv_scales", False) else None,
                "skip": _listed(getattr(cache, "kv_cache_dtype_skip_layers", None)),
            }
        ),
        hash_algorithm=hash_text(_plain(cache.prefix_caching_hash_algo), seed, engine_id),
        revision=facts_text(_revision(config, vllm_config)),
        # What kernels pack inside a dimension, shapes and strides do not tell.
        kv_layout=facts_text({"layout": layout, "groups": ",".join(groups), "vllm": release}),
        topology=facts_text(_topology(vllm_config.parallel_config)),
        salt=config.salt,
    )


def _revision(config: ConnectorConfig, vllm_config: Any) -> dict[str, object]:
    model = vllm_config.model_config
    hf_config = getattr(model, "hf_config", None)
    load_format = _plain(getattr(getattr(vllm_config, "load_config", None), "load_format", None))
    media = getattr(model, "multimodal_config", None)
    return {
        "revision": getattr(model, "revision", None),
        "code": getattr(model, "code_revision", None),
        "commit": commit_of(vllm_config),
        # With dummy weights there is nothing on disk; with a name of its own, that name decides.
        "weights": None if config.model or load_format == "dummy" else fingerprint(model.model),
        # Where they come from if that is no folder.
        "source": getattr(model, "model_weights", None) or None,
        "load": _loading(vllm_config, load_format),
        "config": _digest_of_config(hf_config),
        "classes": _digest(getattr(model, "model_class_overrides", None)),
        "length": _length(hf_config, getattr(model, "max_model_len", None)),
        "quantization": getattr(model, "quantization", None),
        "quantized": _digest(getattr(model, "quantization_config", None)),
        "media": _digest(
            {name: said for name in _MEDIA if (said := getattr(media, name, None)) is not None}
        ),
        "lora": _adapters(getattr(vllm_config, "lora_config", None), model),
        "draft": _draft(getattr(vllm_config, "speculative_config", None)),
    }


def commit_of(vllm_config: Any) -> str | None:
    """Of a model from the hub. None for one with a path, and if nothing tells."""
    model = vllm_config.model_config
    # Newer releases of transformers do not say it any more.
    said = getattr(getattr(model, "hf_config", None), "_commit_hash", None)
    cache = getattr(getattr(vllm_config, "load_config", None), "download_dir", None)
    return said or _name(snapshot_of(model.model, getattr(model, "revision", None), cache))


def known_by_name_alone(config: ConnectorConfig, vllm_config: Any) -> bool:
    """Nothing tells the model's weights from others that come under its name."""
    model, load = vllm_config.model_config, getattr(vllm_config, "load_config", None)
    usual = _plain(getattr(load, "load_format", None)) in (*_USUAL_LOADERS, "None")
    elsewhere = config.model or getattr(model, "model_weights", None) or not usual
    here = os.path.exists(model.model)  # noqa: PTH110
    return not (elsewhere or here) and commit_of(vllm_config) is None


def _name(folder: Path | None) -> str | None:
    return None if folder is None else folder.name


def _loading(vllm_config: Any, load_format: str) -> str | None:
    """What is read, where it may be something else than the usual files in the model's folder."""
    if load_format in (*_USUAL_LOADERS, "None"):
        return None
    more = _digest(getattr(vllm_config.load_config, "model_loader_extra_config", None))
    return load_format if more is None else f"{load_format}/{more}"


def _adapters(lora: Any, model: Any) -> str | None:
    """What this engine makes of an adapter, if not all of it as it is."""
    if lora is None:
        return None
    dtype, modules = _plain(lora.lora_dtype), _listed(getattr(lora, "target_modules", None))
    said = [None if dtype in ("auto", _plain(model.dtype)) else dtype, modules]
    return "/".join(part for part in said if part is not None) or None


def _draft(speculative: Any) -> str | None:
    """The draft model's layers are in the cache too."""
    if speculative is None:
        return None
    draft = getattr(speculative, "draft_model_config", None)
    path = str(getattr(draft, "model", None) or getattr(speculative, "model", None) or "")
    revision = getattr(speculative, "revision", None)
    weights = (_name(snapshot_of(path, revision)), fingerprint(path)) if path else ()
    return "/".join(
        str(part)
        for part in (
            getattr(speculative, "method", None),
            path or None,
            revision,
            getattr(speculative, "quantization", None),
            getattr(speculative, "kv_cache_dtype", None),
            *weights,
            _digest_of_config(getattr(draft, "hf_config", None)),
        )
        if part is not None
    )


def _topology(parallel: Any) -> dict[str, object]:
    def size(name: str) -> int:
        return int(getattr(parallel, name, 1) or 1)

    return {
        "tp": size("tensor_parallel_size"),
        "pp": size("pipeline_parallel_size"),
        "dcp": size("decode_context_parallel_size"),
        "pcp": size("prefill_context_parallel_size"),
        "interleave": size("cp_kv_cache_interleave_size"),
    }


def _digest_of_config(hf_config: Any) -> str | None:
    """Of what the model's configuration says, overrides included: rope, windows, layers."""
    to_dict = getattr(hf_config, "to_dict", None)
    if to_dict is None:
        return None
    return _digest(
        {
            key: value
            for key, value in to_dict().items()
            if not key.startswith("_") and key not in _IDLE_KEYS
        }
    )


def _digest(said: Any) -> str | None:
    """None if nothing was said."""
    if not said:
        return None
    text = json.dumps(said, sort_keys=True, default=_sayable)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sayable(value: Any) -> Any:
    """What JSON has no word for, said alike in all processes."""
    if dataclasses.is_dataclass(value):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _length(hf_config: Any, longest: int | None) -> str | None:
    """On which side of a limit the longest prompt is, where a model computes all prompts otherwise
    beyond it: long rope takes other factors, Llama 4 tunes the temperature of its attention."""
    to_dict = getattr(hf_config, "to_dict", None)
    if to_dict is None or longest is None:
        return None
    limits = sorted(_limits(to_dict()))
    return ",".join(f"{'>' if longest > one else '<='}{one}" for one in limits) or None


def _limits(said: Mapping[str, Any]) -> set[int]:
    found = set()
    if str(said.get("model_type", "")).startswith("llama4"):
        found.add(_LLAMA4_TUNED_BEYOND)
    for key, value in said.items():
        if isinstance(value, Mapping):
            found |= _limits(value)
        elif key == "original_max_position_embeddings" and isinstance(value, int):
            found.add(value)
    return found


def _plain(value: Any) -> str:
    """`torch.bfloat16`, an enum or a text as a text."""
    return str(getattr(value, "value", value)).removeprefix("torch.")


def _listed(values: Any) -> str | None:
    return ",".join(sorted(map(str, values))) if values else None
