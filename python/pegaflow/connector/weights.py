"""A fingerprint of a checkpoint on disk: two of the same name and shape are told apart."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

#: What holds weights or says how to read them.
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*config.json", "*quant*.json")
#: Places of a file that are read, and how many bytes at each: a checkpoint of any size costs
#: milliseconds, and training changes nearly all of its bytes.
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def fingerprint(model: str) -> str | None:
    """Of the checkpoint in the folder or file `model`; None if there is none on this machine.

    It depends on names, sizes and samples of the content, not on where the files are: copies of one
    checkpoint share their blocks. Raises OSError if a file cannot be read.
    """
    files = _files(model)
    if files is None:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            for at in _places(size):
                content.seek(at)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def signature(model: str) -> object:
    """Changes when files of the checkpoint are written anew; costs a look at the folder. Raises
    OSError."""
    stats = [(file.name, file.stat()) for file in _files(model) or ()]
    return [(name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in stats]


def _files(model: str) -> list[Path] | None:
    # Not Path.is_file, which fails for a name that no file can have.
    if os.path.isfile(model):  # noqa: PTH113
        return [Path(model)]
    if os.path.isdir(model):  # noqa: PTH112
        return sorted({file for pattern in _PATTERNS for file in Path(model).glob(pattern)})
    return None


def _places(size: int) -> list[int]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return list(range(0, size, _SAMPLE_BYTES))
    last = size - _SAMPLE_BYTES
    return [last * at // (_SAMPLES - 1) for at in range(_SAMPLES)]
