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
from pegaflow.connector.weights import fingerprint
from pegaflow.connector.weights import signature as signature_of


def packed(hashes: Sequence[bytes], mask: bytes | None) -> bytes:
    """Hashes of vLLM as the daemon takes them, each changed by the mask."""
    if not hashes:
        return b""
    plain = pack_hashes(hashes, len(hashes[0]))
    if mask is None:
        return plain
    full = mask * len(hashes)
    number = int.from_bytes(plain, "little") ^ int.from_bytes(full, "little")
    return number.to_bytes(len(plain), "little")


def combined(*masks: bytes | None) -> bytes | None:
    """One mask for several."""
    total = 0
    for mask in masks:
        total ^= int.from_bytes(mask or b"", "little")
    return total.to_bytes(32, "little") if total else None


@dataclass
class _Adapter:
    mask: bytes
    #: Of its files when they were read; None: they could not be.
    signature: object
    #: They were written anew since: which of both vLLM computes with, nobody tells.
    unsure: bool = False


class Adapters:
    """Masks of LoRA adapters.

    vLLM's hashes have an adapter's name and, in newer releases, its path. Another process, or this
    engine's successor, may have other weights under both.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, str, str], _Adapter] = {}

    def mask(self, request: Any) -> bytes | None:
        """Of the adapter of a request of vLLM; None without one.

        Once the files of an adapter change under its number, each of its requests has a mask of its
        own: vLLM may have the old weights in memory or read the new ones, today or when it needs
        them again. A number of its own for new weights, or `load_inplace`, makes that certain.
        """
        lora = getattr(request, "lora_request", None)
        if not lora:
            return None
        key = (lora.lora_int_id, str(lora.lora_name), str(lora.lora_path))
        known = self._known.get(key)
        if known is None or getattr(lora, "load_inplace", False):
            known = self._known[key] = _read(key[1], key[2])
        elif known.signature != _signature(key[2]):
            known.unsure = True
        return secrets.token_bytes(32) if known.unsure else known.mask


def _read(name: str, path: str) -> _Adapter:
    signature = _signature(path)
    try:
        content = fingerprint(path)
    except OSError:
        # Gone, or going: nobody else's blocks are certain to be of the same adapter.
        content = secrets.token_hex()
    mask = hashlib.sha256(f"{name}\0{content or path}".encode()).digest()
    return _Adapter(mask, signature)


def _signature(path: str) -> object:
    try:
        return signature_of(path)
    except OSError:
        return None
