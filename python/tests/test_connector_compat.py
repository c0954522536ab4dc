"""What is found out about a release of vLLM, on objects of the shapes that its releases have."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pegaflow.connector import compat
from pegaflow.connector.layout import LayoutError


class AttentionSpec:
    def __init__(self, block_size: int, **more: Any) -> None:
        self.block_size = block_size
        self.__dict__.update(more)


class FullAttentionSpec(AttentionSpec): ...


class MLAAttentionSpec(FullAttentionSpec): ...


class SlidingWindowSpec(AttentionSpec): ...


class ChunkedLocalAttentionSpec(AttentionSpec): ...


class CrossAttentionSpec(AttentionSpec): ...


class MambaSpec(AttentionSpec): ...


class Tensor:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


class RSWASpec(FullAttentionSpec): ...


class UniformTypeKVCacheSpecs:
    def __init__(self, **specs: Any) -> None:
        self.kv_cache_specs = specs
        self.block_size = next(iter(specs.values())).block_size


def parallel(**sizes: int) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, **sizes}
        )
    )


@pytest.fixture
def hash_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM hashes every 16 tokens."""
    monkeypatch.setattr(compat, "hash_tokens", lambda *_: 16)


def config(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


@pytest.mark.usefixtures("hash_tokens")
def test_full_attention_is_the_daemons_group_0_wherever_it_stands() -> None:
    groups = compat.cache_groups(
        parallel(), config(SlidingWindowSpec(16, sliding_window=64), FullAttentionSpec(32))
    )
    assert [(group.index, group.number) for group in groups] == [(0, 1), (1, 0)]
    assert [group.window_blocks for group in groups] == [4, None]
    assert [group.hashes_per_block for group in groups] == [1, 2]


@pytest.mark.usefixtures("hash_tokens")
def test_a_model_of_one_window_group_is_asked_for_its_prefix() -> None:
    (group,) = compat.cache_groups(parallel(), config(SlidingWindowSpec(16, sliding_window=64)))
    assert (group.number, group.window_blocks, group.sliding) == (0, None, True)


@pytest.mark.usefixtures("hash_tokens")
def test_a_window_reaches_as_far_back_as_a_draft_model_may() -> None:
    groups = compat.cache_groups(
        parallel(),
        config(
            FullAttentionSpec(16), SlidingWindowSpec(16, sliding_window=65, extra_retained_tokens=1)
        ),
    )
    assert [group.window_blocks for group in groups] == [None, 5]
    assert [group.sliding for group in groups] == [False, True]


@pytest.mark.usefixtures("hash_tokens")
@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (MambaSpec(16), "keeps no state but a request's last one"),
        (MambaSpec(16, mamba_cache_mode="none"), "mamba_cache_mode is none"),
        (CrossAttentionSpec(16), "the encoder's input"),
        (AttentionSpec(16), "only full attention"),
        (RSWASpec(16), "RSWASpec"),
        (FullAttentionSpec(24), "no whole number of hashes"),
        (UniformTypeKVCacheSpecs(a=FullAttentionSpec(16), b=RSWASpec(16)), "RSWASpec"),
        (
            SlidingWindowSpec(16, sliding_window=64, prefix_cacheable=False),
            "none whose blocks vLLM uses again",
        ),
    ],
)
def test_what_is_not_supported_is_refused_at_start(spec: Any, why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        compat.cache_groups(parallel(), config(FullAttentionSpec(16), spec))


@pytest.mark.usefixtures("hash_tokens")
def test_groups_that_vllm_does_not_transfer_are_refused() -> None:
    host = SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=FullAttentionSpec(16), enable_kv_transfer=False)
        ]
    )
    with pytest.raises(LayoutError, match="not to be transferred"):
        compat.cache_groups(parallel(), host)


@pytest.mark.usefixtures("hash_tokens")
@pytest.mark.parametrize("mode", ["align", "all"])
def test_state_is_never_the_group_that_is_asked_for_a_prefix(mode: str) -> None:
    state = MambaSpec(16, mamba_cache_mode=mode, dcp_sharded=False)
    groups = compat.cache_groups(parallel(), config(state, FullAttentionSpec(16)))
    assert [(group.number, group.recurrent) for group in groups] == [(1, True), (0, False)]
    assert [group.window_blocks for group in groups] == [1, None]
    (alone,) = compat.cache_groups(parallel(), config(state))
    assert (alone.number, alone.recurrent, alone.window_blocks) == (1, True, 1)


@pytest.mark.usefixtures("hash_tokens")
def test_chunks_are_known_by_their_tokens() -> None:
    chunked = ChunkedLocalAttentionSpec(16, attention_chunk_size=64)
    groups = compat.cache_groups(parallel(), config(chunked, FullAttentionSpec(16)))
    assert [(group.number, group.chunk_tokens) for group in groups] == [(1, 64), (0, None)]
    assert [groups[0].needed_from(end) for end in (0, 3, 4, 5, 8)] == [0, 0, 4, 4, 8]
    (alone,) = compat.cache_groups(parallel(), config(chunked))
    assert (alone.number, alone.chunk_tokens) == (0, None)


def test_what_a_state_consists_of_is_told_apart() -> None:
    def spec(**more: Any) -> MambaSpec:
        said = {"shapes": ((3, 8), (2, 4)), "dtypes": ("half", "float"), "mamba_type": "mamba2"}
        return MambaSpec(16, **said | more)

    texts = {
        compat.described(spec()),
        compat.described(spec(dtypes=("half", "half"))),
        compat.described(spec(dtypes=("bfloat16", "float"))),
        compat.described(spec(shapes=((8, 3), (2, 4)))),
        compat.described(spec(mamba_type="gdn")),
        compat.described(FullAttentionSpec(16)),
    }
    assert len(texts) == 6


def test_the_tensors_of_a_state_are_layers_of_their_own() -> None:
    kinds = [Tensor((8, 3, 4)), Tensor((8, 2))]
    layers = compat.layers_of({"a": kinds, "b": Tensor((8, 16))}, ["a", "b"], 8)
    assert [(layer.name, layer.block_dim) for layer in layers] == [("a", 0), ("a", 0), ("b", 0)]
    with pytest.raises(LayoutError, match="a state of shape"):
        compat.layers_of({"a": [Tensor((16, 3))]}, ["a"], 8)


@pytest.mark.usefixtures("hash_tokens")
def test_parallel_prefill_adds_no_tokens_to_a_block() -> None:
    (group,) = compat.cache_groups(
        parallel(prefill_context_parallel_size=2), config(FullAttentionSpec(16))
    )
    assert group.block_tokens == 16


@pytest.mark.usefixtures("hash_tokens")
def test_a_block_counts_the_tokens_of_all_shards_of_decode_context_parallelism() -> None:
    (group,) = compat.cache_groups(
        parallel(decode_context_parallel_size=2), config(FullAttentionSpec(16))
    )
    assert group.block_tokens == 32
    (whole,) = compat.cache_groups(
        parallel(decode_context_parallel_size=2), config(FullAttentionSpec(16, dcp_sharded=False))
    )
    assert whole.block_tokens == 16


def test_engines_with_the_same_steps_are_told_from_those_by_themselves() -> None:
    assert compat.in_lockstep(parallel(data_parallel_size=2))
    assert not compat.in_lockstep(parallel(data_parallel_size=1))
    assert not compat.in_lockstep(parallel())


@pytest.mark.parametrize("hashed", [True, False])
def test_whether_hashes_have_the_path_of_an_adapter_is_seen(
    monkeypatch: pytest.MonkeyPatch, hashed: bool
) -> None:
    def keys(request: Any) -> list[Any]:
        lora = request.lora_request
        return [("lora", lora.lora_name, lora.lora_path)] if hashed else [lora.lora_name]

    for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.kv_cache_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    utils: Any = sys.modules["vllm.v1.core.kv_cache_utils"]
    monkeypatch.setattr(sys.modules["vllm.v1.core"], "kv_cache_utils", utils, raising=False)
    assert not compat.names_adapter_paths()
    utils._gen_lora_extra_hash_keys = keys
    assert compat.names_adapter_paths() == hashed


def test_the_last_block_is_dropped_where_vllm_drops_it() -> None:
    def config(**said: bool) -> Any:
        methods = {name: lambda value=value: value for name, value in said.items()}
        return SimpleNamespace(speculative_config=SimpleNamespace(**methods))

    assert not compat.drops_last_block(SimpleNamespace(speculative_config=None))
    assert compat.drops_last_block(config(use_eagle=True, use_eagle_block_drop=True))
    assert not compat.drops_last_block(config(use_eagle=True, use_eagle_block_drop=False))
    # Before 0.30 or so there is no choice.
    assert compat.drops_last_block(config(use_eagle=True))
    assert not compat.drops_last_block(config(use_eagle=False))


def test_attention_that_cannot_begin_inside_a_prompt_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reason(*, mla: bool, caching: bool, cpu: bool) -> str | None:
        module = ModuleType("vllm.platforms")
        module.__dict__["current_platform"] = SimpleNamespace(is_cpu=lambda: cpu)
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", module)
        return compat.begins_at_zero_only(
            SimpleNamespace(
                model_config=SimpleNamespace(use_mla=mla),
                cache_config=SimpleNamespace(enable_prefix_caching=caching),
            )
        )

    assert "save_only" in (reason(mla=True, caching=False, cpu=True) or "")
    assert reason(mla=False, caching=False, cpu=True) is None
    assert reason(mla=True, caching=True, cpu=True) is None
    assert reason(mla=True, caching=False, cpu=False) is None


def test_only_mla_under_tensor_parallelism_alone_is_stored_once() -> None:
    mla, uniform = MLAAttentionSpec(64), UniformTypeKVCacheSpecs(a=MLAAttentionSpec(64))
    assert compat.is_replicated(parallel(tensor_parallel_size=2), mla)
    assert compat.is_replicated(parallel(tensor_parallel_size=2), uniform)
    # A draft model without MLA, in the same group: its heads are spread over the ranks.
    mixed = UniformTypeKVCacheSpecs(a=MLAAttentionSpec(64), b=FullAttentionSpec(64))
    assert not compat.is_replicated(parallel(tensor_parallel_size=2), mixed)
    assert not compat.is_replicated(parallel(), mla)
    assert not compat.is_replicated(parallel(tensor_parallel_size=2), FullAttentionSpec(16))
    assert not compat.is_replicated(parallel(tensor_parallel_size=2, pipeline_parallel_size=2), mla)
    assert not compat.is_replicated(
        parallel(tensor_parallel_size=2, decode_context_parallel_size=2), mla
    )


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((64, 2, 16, 8), 0), ((128, 8, 16), 0), ((2, 64, 16, 8), 1), ((2, 128, 16), 1)],
)
def test_the_dimension_that_counts_the_blocks(shape: tuple[int, ...], dim: int) -> None:
    assert compat.block_dim(shape, 64, "layer") == dim


@pytest.mark.parametrize("shape", [(63, 2, 16), (2, 63), (), (2, 2, 16)])
def test_a_tensor_without_a_clear_block_dimension_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        compat.block_dim(shape, 2 if shape == (2, 2, 16) else 64, "layer")


def vllm_with(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    module = ModuleType("vllm.v1.core.kv_cache_utils")
    module.__dict__.update(values)
    for name in ("vllm", "vllm.v1", "vllm.v1.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.v1.core"].__dict__["kv_cache_utils"] = module
    monkeypatch.setitem(sys.modules, "vllm.v1.core.kv_cache_utils", module)


def test_a_seed_of_the_environment_is_the_same_for_all_processes() -> None:
    one = compat.hash_seed("sha256", {"PYTHONHASHSEED": "0"})
    assert one.value is not None
    assert one == compat.hash_seed("xxhash", {"PYTHONHASHSEED": "0"})
    assert one != compat.hash_seed("sha256", {"PYTHONHASHSEED": "1"})


def test_older_releases_without_a_seed_hash_at_random_and_the_fix_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_with(monkeypatch)
    seed = compat.hash_seed("sha256", {})
    assert seed.value is None
    assert "PYTHONHASHSEED=0" in seed.fix


def test_newer_releases_have_a_fixed_seed_for_cryptographic_hashes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_with(monkeypatch, DEFAULT_NONE_HASH_SEED="seed")
    assert compat.hash_seed("sha256_cbor", {}).value is not None
    assert compat.hash_seed("xxhash", {}).value is None


def test_a_request_that_is_resumed_begins_anew() -> None:
    output = SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id="new", block_ids=([1, 2],), num_computed_tokens=16)
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["grown", "same", "resumed"],
            resumed_req_ids={"resumed"},
            new_block_ids=[([3],), None, ([4, 5],)],
            num_computed_tokens=[32, 40, 0],
        ),
        num_scheduled_tokens={"new": 8, "grown": 1, "same": 1, "resumed": 20},
    )
    step = compat.step_of(output)
    assert step.fresh == [("new", ([1, 2],), 16), ("resumed", ([4, 5],), 0)]
    assert step.grown == [("grown", ([3],))]
    assert step.scheduled["same"] == 1
