"""The names of blocks: vLLM's hashes, changed where they do not say all.

A name is changed by XOR with a mask of 32 bytes, which costs no loop over the blocks.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pegaflow.client import pack_hashes
from pegaflow.connector.weights import fingerprint, snapshot_of
from pegaflow.connector.weights import signature as signature_of


def packed(hashes: Sequence[bytes], mask: bytes | None) -> bytes:
    """Hashes of vLLM as the daemon takes them, each changed by the mask."""
    if not hashes:
        return b""
    plain = pack_hashes(hashes, len(hashes[0]))
    if mask is None:
        return plain
    # vLLM has it; without vLLM nothing but this needs it.
    import numpy as np

    words = np.frombuffer(plain, np.uint64).reshape(len(hashes), -1)
    return (words ^ np.frombuffer(mask, np.uint64)).tobytes()


def combined(*masks: bytes | None) -> bytes | None:
    """One mask for several."""
    total = 0
    for mask in masks:
        total ^= int.from_bytes(mask or b"", "little")
    return total.to_bytes(32, "little") if total else None


@dataclass
class _Adapter:
    mask: bytes
    #: Of its files when they were read; None while they are not on this machine.
    signature: object | None
    #: Others have come in their place since.
    unsure: bool = False


class Adapters:
    """Masks of LoRA adapters.

    vLLM's hashes have an adapter's name and, in newer releases (`by_path`), its path. Another
    process, or this engine's successor, may have other weights under both.
    """

    def __init__(self, *, by_path: bool = True) -> None:
        self._by_path = by_path
        self._known: dict[tuple[str, str], _Adapter] = {}

    def mask(self, request: Any) -> bytes | None:
        """Of the adapter of a request of vLLM; None without one.

        Once other weights come under what vLLM's hashes have of an adapter, each of its requests
        has a mask of its own, for good, whatever its number is and however they were loaded: vLLM's
        own cache still has blocks of the old weights under the same hashes, which such a request
        may begin with. Until they are loaded, it computes with the old ones, too.
        """
        lora = getattr(request, "lora_request", None)
        if not lora:
            return None
        name, path = str(lora.lora_name), str(lora.lora_path)
        key = (name, path if self._by_path else "")
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _read(name, path)
        elif known.signature is None:
            # By now vLLM may have them from the hub.
            known.signature = _signature(path)
        elif known.signature != _signature(path):
            known.unsure = True
        return secrets.token_bytes(32) if known.unsure else known.mask


def _read(name: str, path: str) -> _Adapter:
    signature = _signature(path)
    try:
        content = fingerprint(_place(path))
    except OSError:
        content = None
    # Not here yet, gone, or going: nobody else's blocks are certain to be of the same adapter.
    mask = hashlib.sha256(f"{name}\0{content or secrets.token_hex()}".encode()).digest()
    return _Adapter(mask, signature)


def _signature(path: str) -> object | None:
    place = _place(path)
    try:
        files = signature_of(place)
    except OSError:
        return place, None
    return (place, files) if files else None


def _place(path: str) -> str:
    """Of the files of an adapter that has a path, or a name on the hub."""
    return str(snapshot_of(path) or path)
