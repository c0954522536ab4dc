"""Names of blocks: vLLM's hashes, and what a mask makes of them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from pegaflow.connector.names import Adapters, packed

MASK = sha256(b"mask").digest()


def hashes(count: int) -> list[bytes]:
    return [sha256(bytes([at])).digest() for at in range(count)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_mask_changes_each_name_by_itself(count: int) -> None:
    names = hashes(count)
    assert packed(names, None) == b"".join(names)
    changed = packed(names, MASK)
    assert changed == b"".join(
        bytes(one ^ other for one, other in zip(name, MASK, strict=True)) for name in names
    )
    masked = [changed[at : at + 32] for at in range(0, len(changed), 32)]
    assert packed(masked, MASK) == b"".join(names)


def test_a_short_hash_is_filled_up_before_it_is_changed() -> None:
    short = [name[:16] for name in hashes(3)]
    assert packed(short, MASK) == packed([name + bytes(16) for name in short], MASK)


def with_adapter(path: str) -> SimpleNamespace:
    return SimpleNamespace(lora_request=SimpleNamespace(lora_name="adapter", lora_path=path))


@pytest.mark.parametrize("path", ["~/adapter", "org/adapter"])
def test_an_adapter_is_told_by_its_files_wherever_vllm_finds_them(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    places = {
        "~/adapter": tmp_path / "adapter",
        "org/adapter": tmp_path / "models--org--adapter" / "snapshots" / "main",
    }
    places[path].mkdir(parents=True)
    file = places[path] / "adapter_model.safetensors"
    file.write_text("one")
    request = with_adapter(path)
    engine = Adapters()
    first = engine.mask(request)
    assert first == engine.mask(request) == Adapters().mask(request)
    file.write_text("other")
    assert Adapters().mask(request) != first
    assert engine.mask(request) != first


def test_an_adapter_that_is_still_on_the_hub_is_this_engines_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    request = with_adapter("org/adapter")
    engine = Adapters()
    first = engine.mask(request)
    assert Adapters().mask(request) != first
    # vLLM brings it after the first request, and cached blocks are found all the same.
    folder = tmp_path / "models--org--adapter" / "snapshots" / "main"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text("one")
    assert engine.mask(request) == engine.mask(request) == first
    (folder / "adapter_model.safetensors").write_text("other")
    assert len({first, engine.mask(request), engine.mask(request)}) == 3
