"""Whatever changes the bytes of a block changes the namespace, and nothing else does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from struct import pack
from types import SimpleNamespace
from typing import Any

import pytest

from pegaflow.client import Namespace
from pegaflow.connector.config import ConnectorConfig
from pegaflow.connector.describe import known_by_name_alone, namespace_of
from pegaflow.connector.namespace import MAX_TEXT, HashSeed, facts_text, from_wire, to_wire
from pegaflow.connector.weights import fingerprint, snapshot_of


class HfConfig:
    """What is read of a model's configuration."""

    def __init__(self, **said: Any) -> None:
        self.said = {"rope_theta": 10000.0, "num_hidden_layers": 2, **said}
        self._commit_hash = said.get("commit")

    def to_dict(self) -> dict[str, Any]:
        return {**self.said, "_name_or_path": str(id(self)), "transformers_version": str(id(self))}


def vllm(**changes: Any) -> Any:
    """vLLM's configuration with some values changed; a key is `part__name`."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "model": "org/model",
            "revision": None,
            "dtype": "torch.bfloat16",
            "quantization": None,
            "hf_config": HfConfig(),
        },
        "cache_config": {
            "cache_dtype": "auto",
            "calculate_kv_scales": False,
            "prefix_caching_hash_algo": "sha256",
            "kv_cache_dtype_skip_layers": [],
        },
        "parallel_config": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "load_config": {"load_format": "auto"},
        "kv_transfer_config": {"engine_id": "engine-1"},
    }
    whole: dict[str, Any] = {"speculative_config": None}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            parts[part][name] = value
        else:
            whole[part] = value
    return SimpleNamespace(
        **{name: SimpleNamespace(**part) for name, part in parts.items()}, **whole
    )


SEED = HashSeed("env:0")


def namespace(
    config: ConnectorConfig | None = None,
    seed: HashSeed = SEED,
    tokens: int = 16,
    layout: str = "1*2x0:16/1",
    groups: tuple[str, ...] = ("FullAttentionSpec:16",),
    release: str | None = "0.32.0",
    **changes: Any,
) -> Namespace:
    return namespace_of(
        config or ConnectorConfig(), vllm(**changes), seed, tokens, layout, groups, release
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config__model": "org/other"},
        {"model_config__revision": "v2"},
        {"model_config__code_revision": "v2"},
        {"model_config__dtype": "torch.float16"},
        {"model_config__quantization": "fp8"},
        {"model_config__hf_config": HfConfig(rope_theta=1e6)},
        {"model_config__hf_config": HfConfig(commit="abc")},
        {"cache_config__cache_dtype": "fp8_e4m3"},
        {"cache_config__calculate_kv_scales": True},
        {"cache_config__prefix_caching_hash_algo": "sha256_cbor"},
        {"cache_config__kv_cache_dtype_skip_layers": ["0"]},
        {"parallel_config__tensor_parallel_size": 2},
        {"parallel_config__pipeline_parallel_size": 2},
        {"parallel_config__decode_context_parallel_size": 2},
        {"parallel_config__cp_kv_cache_interleave_size": 16},
        {"load_config__load_format": "dummy"},
        {"speculative_config": SimpleNamespace(method="eagle", model="org/draft")},
        {"config": ConnectorConfig(salt="tenant")},
        {"config": ConnectorConfig(model="other")},
        {"seed": HashSeed("env:1")},
        {"seed": HashSeed(None)},
        {"tokens": 32},
        {"layout": "1*2x1:16/1"},
        {"groups": ("SlidingWindowSpec:16",)},
        {"release": "0.33.0"},
        {"model_config__model_weights": "s3://bucket/model"},
        {"model_config__quantization_config": {"linear": {"weight": "mxfp8"}}},
        {"model_config__model_class_overrides": {"OneForCausalLM": "other:OneForCausalLM"}},
        {"model_config__multimodal_config": SimpleNamespace(mm_processor_kwargs={"size": 224})},
        {"model_config__multimodal_config": SimpleNamespace(video_pruning_rate=0.5)},
        {"load_config__load_format": "mistral"},
        {"lora_config": SimpleNamespace(lora_dtype="torch.float16", target_modules=None)},
        {"lora_config": SimpleNamespace(lora_dtype="auto", target_modules=["o_proj"])},
        {"parallel_config__prefill_context_parallel_size": 2},
    ],
    ids=str,
)
def test_what_changes_the_bytes_changes_the_namespace(changes: dict[str, Any]) -> None:
    assert namespace(**changes) != namespace()


@pytest.mark.parametrize(
    "changes",
    [
        {"load_config__load_format": "safetensors"},
        {"model_config__model_weights": ""},
        {"model_config__multimodal_config": SimpleNamespace(mm_processor_kwargs=None)},
        {"lora_config": SimpleNamespace(lora_dtype="torch.bfloat16", target_modules=None)},
    ],
    ids=str,
)
def test_what_changes_no_byte_changes_no_namespace(changes: dict[str, Any]) -> None:
    assert namespace(**changes) == namespace()


def test_where_a_loader_is_told_to_read_changes_the_namespace() -> None:
    def of(uri: str) -> Namespace:
        return namespace(
            load_config__load_format="tensorizer",
            load_config__model_loader_extra_config={"tensorizer_uri": uri},
        )

    assert of("s3://bucket/one") != of("s3://bucket/two")


@pytest.mark.parametrize("what", ["quantization", "kv_cache_dtype"])
def test_what_is_made_of_the_draft_model_changes_the_namespace(what: str) -> None:
    def of(**said: Any) -> Namespace:
        draft = SimpleNamespace(method="eagle", model="org/draft", **said)
        return namespace(speculative_config=draft)

    assert of(**{what: "fp8_e5m2"}) != of(**{what: "fp8_e4m3"}) != of()


def test_a_set_is_said_alike_in_all_processes() -> None:
    texts = {f"layer-{at}" for at in range(9)}
    config = HfConfig(skipped=texts)
    other = HfConfig(skipped=sorted(texts))
    assert namespace(model_config__hf_config=config) == namespace(model_config__hf_config=other)


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ({"original_max_position_embeddings": 4096}, 4096),
        ({"text_config": {"rope_scaling": {"original_max_position_embeddings": 8192}}}, 8192),
        ({"model_type": "llama4"}, 32768),
    ],
)
def test_a_longest_prompt_beyond_which_all_is_computed_otherwise_changes_the_namespace(
    said: dict[str, Any], limit: int
) -> None:
    def up_to(longest: int, **said: Any) -> Namespace:
        return namespace(
            model_config__hf_config=HfConfig(**said), model_config__max_model_len=longest
        )

    assert up_to(limit, **said) != up_to(limit + 1, **said)
    assert up_to(limit, **said) == up_to(limit // 2, **said)
    # Of other models it changes nothing.
    assert up_to(limit) == up_to(limit + 1)


def test_another_process_of_the_same_engine_or_replica_has_the_same_namespace() -> None:
    assert namespace() == namespace(kv_transfer_config__engine_id="engine-2")


def test_a_random_hash_seed_keeps_the_engine_to_itself() -> None:
    one = namespace(seed=HashSeed(None))
    other = namespace(seed=HashSeed(None), kv_transfer_config__engine_id="engine-2")
    assert one != other
    assert "random" in one.hash_algorithm
    assert one == namespace(seed=HashSeed(None))


def test_scales_that_an_engine_measures_itself_keep_it_to_itself() -> None:
    one = namespace(cache_config__calculate_kv_scales=True)
    other = namespace(
        cache_config__calculate_kv_scales=True, kv_transfer_config__engine_id="engine-2"
    )
    assert one != other


def test_two_checkpoints_of_the_same_shape_and_place_are_told_apart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = bytearray(3_000_000)
    (model / "model.safetensors").write_bytes(weights)
    before = namespace(model_config__model=str(model))
    assert before == namespace(model_config__model=str(model))
    first = fingerprint(str(model))
    # A copy elsewhere is the same checkpoint.
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert fingerprint(str(copy)) == first
    for at in range(0, len(weights), 1000):
        weights[at] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert namespace(model_config__model=str(model)) != before
    assert fingerprint(str(model)) != first
    assert fingerprint("org/no-such-folder") is None


def written(path: Path, tensors: dict[str, bytes]) -> None:
    """A file in the safetensors format."""
    header, data = {}, b""
    for name, content in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": offsets}
        data += content
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(pack("<Q", len(text)) + text + data)


def test_one_other_byte_of_a_small_checkpoint_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    seen = set()
    for at in (None, 0, 1_234_567, 2_999_999):
        weights = bytearray(3_000_000)
        if at is not None:
            weights[at] = 1
        written(file, {"all": bytes(weights)})
        seen.add(fingerprint(str(tmp_path)))
    assert len(seen) == 4


def test_each_tensor_of_a_large_checkpoint_is_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    plain = {f"matrix-{at}": bytes(1 << 20) for at in range(17)} | {
        f"norm-{at}": bytes(2000) for at in range(17)
    }
    seen = {fingerprint(str(tmp_path))}
    names = ("matrix-0", "matrix-9", "norm-0", "norm-9", "norm-16")
    for name in (None, *names):
        changed = plain if name is None else plain | {name: b"\1" * len(plain[name])}
        written(file, changed)
        seen.add(fingerprint(str(tmp_path)))
    assert len(seen) == 2 + len(names)


def test_large_files_of_other_formats_are_sampled(tmp_path: Path) -> None:
    seen = set()
    for start in (
        b"",
        b"PK",
        pack("<Q", 5) + b"12345",
        pack("<Q", 1 << 62),
        pack("<Q", 4) + b"[17]",
    ):
        (tmp_path / "model.bin").write_bytes(start.ljust(20_000_000, b"\0"))
        seen.add(fingerprint(str(tmp_path)))
    assert len(seen) == 5


ONE, TWO = "1" * 40, "2" * 40


def in_cache(cache: Path, commit: str, name: str = "org--model", ref: str = "main") -> Path:
    """A snapshot in the hub's cache, to which a branch or tag points now."""
    repository = cache / f"models--{name}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return folder


def test_a_model_of_the_hub_is_told_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    unknown = namespace()
    in_cache(tmp_path, ONE)
    one = namespace()
    assert one == namespace() != unknown
    assert ONE in str(one.revision)
    in_cache(tmp_path, TWO)
    assert namespace() != one
    in_cache(tmp_path, ONE, ref="v1")
    assert ONE in str(namespace(model_config__revision="v1").revision)
    assert TWO in str(namespace(model_config__revision=TWO).revision)
    # The weights may lie in another place than the rest.
    other = tmp_path / "other"
    in_cache(other, ONE)
    assert namespace(load_config__download_dir=str(other)) == one


def test_a_name_that_stands_for_any_weights_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    plain = ConnectorConfig()
    assert known_by_name_alone(plain, vllm())
    assert not known_by_name_alone(ConnectorConfig(model="mine"), vllm())
    assert not known_by_name_alone(plain, vllm(load_config__load_format="dummy"))
    assert not known_by_name_alone(plain, vllm(model_config__model=str(tmp_path)))
    in_cache(tmp_path, ONE)
    assert not known_by_name_alone(plain, vllm())


def test_a_draft_model_of_the_hub_is_told_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    draft = SimpleNamespace(method="eagle", model="org/draft")
    seen = {namespace(speculative_config=draft).revision}
    for commit in (ONE, TWO):
        in_cache(tmp_path, commit, "org--draft")
        seen.add(namespace(speculative_config=draft).revision)
    assert len(seen) == 3


def test_the_hubs_cache_is_where_its_library_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert snapshot_of("org/model") is None
    below = tmp_path / ".cache" / "huggingface" / "hub"
    assert in_cache(below, ONE) == snapshot_of("org/model")
    for name, folder, cache in (
        ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
        ("HF_HOME", "home", "home/hub"),
        ("HF_HUB_CACHE", "cache", "cache"),
    ):
        monkeypatch.setenv(name, str(tmp_path / folder))
        wanted = in_cache(tmp_path / cache, TWO)
        assert snapshot_of("org/model") == wanted


def test_what_is_no_name_of_the_hub_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    in_cache(tmp_path, ONE)
    for name in ("/org/model", "../model", "a/b/c", "s3://bucket/model", "m" * 4000, ""):
        assert snapshot_of(name) is None
    # A folder of that name goes first.
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert snapshot_of("org/model") is None


def test_what_has_a_files_name_and_is_none_keeps_no_engine_from_starting(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    before = fingerprint(str(tmp_path))
    (tmp_path / "old.bin").symlink_to(tmp_path / "blob-that-is-gone")
    (tmp_path / "checkpoint.pt").mkdir()
    assert fingerprint(str(tmp_path)) == before


def test_code_that_comes_with_a_checkpoint_is_part_of_it(tmp_path: Path) -> None:
    code = tmp_path / "modeling.py"
    code.write_text("scale = 1")
    before = fingerprint(str(tmp_path))
    code.write_text("scale = 2")
    assert fingerprint(str(tmp_path)) != before


def test_no_text_is_longer_than_the_daemon_takes() -> None:
    long = namespace(
        model_config__model="m" * 3000,
        layout=",".join(map(str, range(2000))),
        model_config__revision="r" * 2000,
    )
    wire = to_wire(long)
    assert all(len(text.encode()) <= MAX_TEXT for text in wire.values() if isinstance(text, str))
    assert long != namespace(model_config__model="m" * 3001, model_config__revision="r" * 2000)


def test_the_namespace_is_the_same_after_its_way_to_the_scheduler() -> None:
    assert from_wire(to_wire(namespace())) == namespace()


def test_facts_that_are_not_given_are_not_said() -> None:
    assert facts_text({"a": 1, "b": None, "c": "x"}) == "a=1;c=x"
