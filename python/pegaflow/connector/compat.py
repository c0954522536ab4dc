"""Everything that differs between releases of vLLM, 0.26 to 0.33, found out by looking.

No other module asks for a version or for the presence of an attribute of vLLM. It can be imported
without vLLM, as its tests do.
"""

# vLLM is where this runs, not where it is checked.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from pegaflow.connector.events import MEDIUM, Stored
from pegaflow.connector.groups import CacheGroup, window_blocks
from pegaflow.connector.layout import Layer, LayoutError
from pegaflow.connector.namespace import HashSeed
from pegaflow.connector.scheduler import Step

#: Kinds of cache that hold a prefix: by the names of vLLM's classes, their bases included.
_PREFIX_KINDS = ("FullAttentionSpec",)
_WINDOW_KINDS = ("SlidingWindowSpec",)
_CHUNK_KINDS = ("ChunkedLocalAttentionSpec",)
_STATE_KINDS = ("MambaSpec",)
_MLA_KINDS = ("MLAAttentionSpec", "SlidingWindowMLASpec")
#: Kinds that cannot be cached, or whose bases look like one of the above.
_REFUSED_KINDS = {
    "CrossAttentionSpec": "its blocks follow from the encoder's input, which no block hash names",
    "RSWASpec": "it does not keep a block for each run of tokens",
    "HiddenStateCacheSpec": "it keeps no KV",
    "SinkFullAttentionSpec": "its sinks are in no block hash",
    "CircularBufferSpec": "its blocks are written over in a ring",
}

_FIX = "set PYTHONHASHSEED=0 for every vLLM process"


try:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
except ImportError:
    base = None

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HIT_SOURCE: Any = CacheHitSource.HOST
except ImportError:
    HIT_SOURCE = None

#: Since 0.30 workers can name requests whose loads failed.
HAS_TRANSFER_RESULTS = hasattr(base, "KVConnectorTransferResults")

#: Since 0.33 workers are told that the KV cache's memory goes and comes back.
TELLS_OF_SLEEP = hasattr(getattr(base, "KVConnectorBase_V1", None), "unregister_kv_caches")


def transfer_results(loaded: set[str], failed: set[str]) -> Any:
    """Ended and failed loads, as vLLM takes them."""
    assert base is not None
    return base.KVConnectorTransferResults(finished_recving=loaded, failed_recving=failed)


def make_known(name: str, module: str) -> None:
    """Lets a MultiConnector find the connector by its name alone, as it does when statistics arrive
    from another process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # Refused if the name is taken, so by who made the connector known already.
    with contextlib.suppress(ValueError):
        KVConnectorFactory.register_connector(name, module, name)


def logger() -> logging.Logger:
    """A logger whose lines appear among vLLM's: only those below "vllm" have a handler."""
    return logging.getLogger("vllm.pegaflow")


def hash_seed(algorithm: str, environment: Mapping[str, str] = os.environ) -> HashSeed:
    """What block hashes begin with, for every process of this engine."""
    named = environment.get("PYTHONHASHSEED")
    if named is not None:
        return HashSeed("env:" + named)
    from vllm.v1.core import kv_cache_utils

    # Since 0.30 or so, cryptographic hashes have a fixed seed.
    fixed = getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None)
    if fixed is not None and not algorithm.startswith("xxhash"):
        return HashSeed("default:" + str(fixed))
    return HashSeed(None, _FIX)


def hash_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens of one block hash."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    return int(resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1])


def release() -> str | None:
    """vLLM's version."""
    try:
        from vllm.version import __version__
    except ImportError:
        return None
    return str(__version__)


def names_adapter_paths() -> bool:
    """vLLM's block hashes tell two adapters of one name by their paths."""
    from vllm.v1.core import kv_cache_utils

    keys_of = getattr(kv_cache_utils, "_gen_lora_extra_hash_keys", None)
    adapter = SimpleNamespace(lora_int_id=1, lora_name="name", lora_path="path")
    return keys_of is not None and "path" in str(keys_of(SimpleNamespace(lora_request=adapter)))


def in_lockstep(vllm_config: Any) -> bool:
    """Each step of this engine is one of others too, which wait for it: the experts of a model
    spread over data parallel engines. Those of other models have a size of 1, each by itself."""
    return int(getattr(vllm_config.parallel_config, "data_parallel_size", 1) or 1) > 1


def drops_last_block(vllm_config: Any) -> bool:
    """vLLM's own hits end a block before the last one that is cached: there the draft model's KV
    depends on the token behind the block, which is not in the block's name."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None:
        return False
    said = getattr(speculative, "use_eagle_block_drop", None) or speculative.use_eagle
    return bool(said())


def begins_at_zero_only(vllm_config: Any) -> str | None:
    """Why this model's attention cannot go on from cached blocks on this platform, if it cannot."""
    uses_mla = bool(getattr(vllm_config.model_config, "use_mla", False))
    if not uses_mla or getattr(vllm_config.cache_config, "enable_prefix_caching", True):
        return None
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    return (
        "MLA without prefix caching on a CPU: vLLM turns it off where its kernels cannot begin in"
        " the middle of a prompt, and what is loaded would be computed wrongly; use"
        " pegaflow.mode=save_only, or a machine with AMX and prefix caching"
    )


def specs_of(spec: Any) -> list[Any]:
    """The specifications of a group's layers: a group of one kind may have one for each layer."""
    several = getattr(spec, "kv_cache_specs", None)
    return list(several.values()) if isinstance(several, dict) and several else [spec]


def kinds_of(spec: Any) -> list[str]:
    """The names of a cache specification's class and its bases; for a group of several
    specifications of one kind, those of the first."""
    return [kind.__name__ for kind in type(specs_of(spec)[0]).__mro__]


def cache_groups(vllm_config: Any, kv_cache_config: Any) -> list[CacheGroup]:
    """The model's cache groups in vLLM's order. Raises LayoutError for one that is not supported.

    The first group of full attention is the daemon's group 0, which is asked for a prefix; without
    full attention, the first one that keeps all blocks of a prefix for a while.
    """
    tokens = hash_tokens(vllm_config, kv_cache_config)
    found: list[CacheGroup] = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if not getattr(group, "enable_kv_transfer", True):
            raise LayoutError(f"cache group {index} is not to be transferred, says vLLM")
        block = _block_tokens(vllm_config, spec)
        if block % tokens:
            raise LayoutError(
                f"cache group {index}: a block of {block} tokens is no whole number of hashes of"
                f" {tokens} tokens"
            )
        plain = CacheGroup(index, 0, block, block // tokens)
        found.append(replace(plain, **_needs(index, spec, block)))
    if not found:
        raise LayoutError("the model has no KV cache")
    attention = [group for group in found if not group.recurrent]
    prefix = next((group for group in attention if group.whole), next(iter(attention), None))
    groups, number = [], 1
    for group in found:
        if group is prefix:
            # It is asked for a prefix: it cannot do with its last blocks alone.
            groups.append(replace(group, number=0, window_blocks=None, chunk_tokens=None))
        else:
            groups.append(replace(group, number=number))
            number += 1
    return groups


def _block_tokens(vllm_config: Any, spec: Any) -> int:
    parallel = vllm_config.parallel_config
    # Ranks of parallel prefill add nothing: each has its part of a block, or all of it.
    shards = int(getattr(parallel, "decode_context_parallel_size", 1) or 1)
    # Before 0.30 or so all groups of attention are spread over the shards.
    return int(spec.block_size) * (shards if getattr(spec, "dcp_sharded", True) else 1)


def _needs(index: int, spec: Any, block: int) -> dict[str, Any]:
    """What a token needs of a group's blocks, as fields of `CacheGroup`."""
    kinds = kinds_of(spec)
    all_kinds = [kind for one in specs_of(spec) for kind in kinds_of(one)]
    for kind, why in _REFUSED_KINDS.items():
        if kind in all_kinds:
            raise LayoutError(f"cache group {index} ({kind}) is not supported: {why}")
    if not getattr(spec, "prefix_cacheable", True):
        # Such as windows that vLLM fills anew after a hit, with less context than they had.
        raise LayoutError(f"cache group {index} ({kinds[0]}) is none whose blocks vLLM uses again")
    if any(kind in kinds for kind in _STATE_KINDS):
        modes = {getattr(one, "mamba_cache_mode", "none") for one in specs_of(spec)}
        if "none" in modes:
            raise LayoutError(
                f"cache group {index} ({kinds[0]}) keeps no state but a request's last one:"
                " enable_prefix_caching is off, or mamba_cache_mode is none"
            )
        return {"window_blocks": 1, "recurrent": True, "sliding": True}
    if any(kind in kinds for kind in _WINDOW_KINDS):
        # Some draft models need more than the window.
        more = int(getattr(spec, "extra_retained_tokens", 0))
        wide = window_blocks(int(spec.sliding_window) + more, block)
        return {"window_blocks": wide, "sliding": True}
    if any(kind in kinds for kind in _CHUNK_KINDS):
        return {"chunk_tokens": int(spec.attention_chunk_size), "sliding": True}
    if any(kind in kinds for kind in _PREFIX_KINDS):
        return {}
    raise LayoutError(
        f"cache group {index} ({kinds[0]}) is not supported: only full attention, MLA, windows,"
        " chunks and recurrent state are"
    )


def described(spec: Any) -> str:
    """What a group's blocks mean beyond their sizes, for the namespace."""
    one = specs_of(spec)[0]
    text = f"{kinds_of(spec)[0]}:{spec.block_size}"
    if not any(kind in kinds_of(spec) for kind in _STATE_KINDS):
        return text
    kind = getattr(one, "mamba_type", None)
    said = [
        getattr(kind, "name", kind),
        *(f"{dtype}{list(shape)}" for dtype, shape in zip(one.dtypes, one.shapes, strict=True)),
        # Two orders of the same sizes, chosen by the environment.
        os.environ.get("VLLM_SSM_CONV_STATE_LAYOUT"),
    ]
    return ":".join([text, *(str(part) for part in said if part is not None)])


def is_replicated(vllm_config: Any, spec: Any) -> bool:
    """All ranks hold the same bytes of this group: MLA in all its layers, those of a draft model
    included."""
    parallel = vllm_config.parallel_config
    alone = (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    )
    return (
        all(any(kind in _MLA_KINDS for kind in kinds_of(one)) for one in specs_of(spec))
        and int(parallel.tensor_parallel_size) > 1
        and all(int(getattr(parallel, name, 1) or 1) == 1 for name in alone)
    )


def layers_of(kv_caches: Mapping[str, Any], names: list[str], num_blocks: int) -> list[Layer]:
    """The tensors of a group's layers, in order. Raises LayoutError if one is missing."""
    layers = []
    for name in names:
        tensor = kv_caches.get(name)
        if tensor is None:
            raise LayoutError(f"vLLM registered no cache for layer {name}")
        if isinstance(tensor, (list, tuple)):
            # Recurrent state: one tensor for each of its kinds, all of them by block.
            for part in tensor:
                if not part.shape or part.shape[0] != num_blocks:
                    raise LayoutError(
                        f"{name}: a state of shape {list(part.shape)} for {num_blocks} blocks"
                    )
                layers.append(Layer(name, part, 0))
            continue
        layers.append(Layer(name, tensor, block_dim(tuple(tensor.shape), num_blocks, name)))
    return layers


def block_dim(shape: tuple[int, ...], num_blocks: int, name: str) -> int:
    """The dimension that counts the blocks: the first one in every backend of 0.26 and later, but
    for those that keep keys and values apart, `[2, num_blocks, ...]`."""
    if shape and shape[0] % num_blocks == 0 and shape[0] >= num_blocks:
        if len(shape) > 1 and shape[0] == 2 and shape[1] % num_blocks == 0:
            raise LayoutError(
                f"{name}: either dimension of shape {list(shape)} may count {num_blocks} blocks"
            )
        return 0
    if len(shape) > 1 and shape[0] == 2 and shape[1] % num_blocks == 0:
        return 1
    raise LayoutError(f"{name}: no dimension of shape {list(shape)} counts {num_blocks} blocks")


def cross_layer_dim(backend: Any) -> int:
    """The dimension that counts the blocks in a tensor of all layers, as vLLM shapes it for the
    attention backend. Raises LayoutError."""
    shape = backend.get_kv_cache_shape(1234, 16, 1, 256)
    order = backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    logical = tuple(shape).index(1234) + 1
    at = tuple(order).index(logical)
    if at != 0:
        raise LayoutError(f"a tensor of all layers counts its blocks in dimension {at}, not first")
    return at


def cross_layer_layout() -> str | None:
    """The name of the layout that has all layers of a block side by side, where layouts have such
    names (since 0.30). What the model's attention cannot use, vLLM leaves aside."""
    try:
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ImportError:
        return None
    from vllm.platforms import current_platform

    # On a CPU there is nothing to win.
    if not current_platform.is_cuda() or not hasattr(KVCacheLayout, "BLNHC"):
        return None
    return "BLNHC"


def stored_event(event: Stored) -> Any:
    """As vLLM's event publisher takes it."""
    from vllm.distributed.kv_events import BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    return BlockStored(
        block_hashes=[maybe_convert_block_hash(one) for one in event.hashes],
        parent_block_hash=None if event.parent is None else maybe_convert_block_hash(event.parent),
        token_ids=event.token_ids,
        block_size=event.block_tokens,
        lora_id=None,
        medium=MEDIUM,
        lora_name=event.lora_name,
        group_idx=event.group_index,
    )


def rank_of(vllm_config: Any) -> int:
    """This worker's place among the ranks of its engine."""
    parallel = vllm_config.parallel_config
    return int(parallel.rank) % int(parallel.world_size)


def step_of(output: Any) -> Step:
    """What a step schedules."""
    fresh = [
        (new.req_id, new.block_ids, int(new.num_computed_tokens))
        for new in output.scheduled_new_reqs
    ]
    grown = []
    cached = output.scheduled_cached_reqs
    for at, request_id in enumerate(cached.req_ids):
        blocks = cached.new_block_ids[at]
        if request_id in cached.resumed_req_ids:
            fresh.append((request_id, blocks or (), int(cached.num_computed_tokens[at])))
        elif blocks is not None:
            grown.append((request_id, blocks))
    return Step(fresh, grown, output.num_scheduled_tokens)


def current_stream(device: str) -> Any | None:
    """The stream on which the model's work is, on a GPU."""
    if device != "cuda":
        return None
    import torch

    return torch.cuda.current_stream()
