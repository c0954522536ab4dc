"""A fingerprint of a checkpoint on disk: two of the same name and shape are told apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

#: What holds weights, says how to read them, or computes with them.
_PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors"),
    *("*config.json", "*quant*.json", "*.py"),
)
#: Files up to this size are read whole. Of a larger one so many places are, with so many bytes at
#: each, and so many in the middle of each tensor, as far as the file says where those are: training
#: changes nearly all bytes of a tensor, but not always all tensors.
_WHOLE_BYTES = 16 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 4096
_TENSOR_BYTES = 512
#: What the hub calls its repositories.
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
#: Longest header of the safetensors format.
_MAX_HEADER = 100_000_000


def snapshot_of(name: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """The folder with what a name on the Hugging Face hub stands for, if that is in the hub's cache
    (or in another one, `cache`) on this machine; it is called after the commit. None for a path."""
    if os.path.exists(name) or not _HUB_NAME.fullmatch(name):  # noqa: PTH110
        return None
    repository = Path(cache or _hub_cache()) / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    with contextlib.suppress(OSError, ValueError):
        commit = (repository / "refs" / commit).read_text(encoding="utf-8").strip()
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def _hub_cache() -> Path:
    """Where `huggingface_hub` keeps what it has downloaded."""
    said = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if said:
        return Path(said).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def fingerprint(model: str) -> str | None:
    """Of the checkpoint in the folder or file `model`; None if there is none on this machine.

    It depends on names, sizes and samples of the content, not on where the files are: copies of one
    checkpoint are the same. Raises OSError if a file cannot be read.
    """
    files = _files(model)
    if files is None:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            for at, length in _places(content, size):
                content.seek(at)
                digest.update(content.read(length))
    return digest.hexdigest()[:32]


def signature(model: str) -> object:
    """Changes when files of the checkpoint are written anew; costs a look at the folder. Raises
    OSError."""
    stats = [(file.name, file.stat()) for file in _files(model) or ()]
    return [(name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in stats]


def _files(model: str) -> list[Path] | None:
    # As vLLM does with an adapter's.
    model = os.path.expanduser(model)  # noqa: PTH111
    # Not Path.is_file, which fails for a name that no file can have.
    if os.path.isfile(model):  # noqa: PTH113
        return [Path(model)]
    if os.path.isdir(model):  # noqa: PTH112
        found = {file for pattern in _PATTERNS for file in Path(model).glob(pattern)}
        # No folders, and no links to what is not in the hub's cache.
        return sorted(file for file in found if file.is_file())
    return None


def _places(content: BinaryIO, size: int) -> Iterable[tuple[int, int]]:
    if size <= _WHOLE_BYTES:
        yield 0, size
        return
    last = size - _SAMPLE_BYTES
    yield from ((last * at // (_SAMPLES - 1), _SAMPLE_BYTES) for at in range(_SAMPLES))
    for begin, end in _tensors(content, size):
        yield max(begin, (begin + end - _TENSOR_BYTES) // 2), min(end - begin, _TENSOR_BYTES)


def _tensors(content: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Where the tensors of a safetensors file lie; none if it is none."""
    content.seek(0)
    length = int.from_bytes(content.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        return []
    try:
        said = json.loads(content.read(length))
        places = [one["data_offsets"] for name, one in said.items() if name != "__metadata__"]
        found = sorted((8 + length + int(begin), 8 + length + int(end)) for begin, end in places)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
    return [(begin, end) for begin, end in found if 0 <= begin <= end <= size]
