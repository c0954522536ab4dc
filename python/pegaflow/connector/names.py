"""The names of blocks: vLLM's hashes, changed where they do not say all.

A name is changed by XOR with a mask of 32 bytes, which costs no loop over the blocks.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from pegaflow.client import pack_hashes
from pegaflow.connector.weights import fingerprint


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


class Adapters:
    """Masks of LoRA adapters.

    vLLM's hashes have an adapter's name and, in newer releases, its path. Another process, or this
    engine's successor, may have other weights under both.
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[object, str, str], bytes] = {}

    def mask(self, request: Any) -> bytes | None:
        """Of the adapter of a request of vLLM; None without one."""
        lora = getattr(request, "lora_request", None)
        if not lora:
            return None
        key = (lora.lora_int_id, str(lora.lora_name), str(lora.lora_path))
        mask = self._masks.get(key)
        if mask is None or getattr(lora, "load_inplace", False):
            try:
                content = fingerprint(key[2])
            except OSError:
                # Gone, or going: nobody else's blocks are certain to be of the same adapter.
                content = secrets.token_hex()
            mask = hashlib.sha256(f"{key[1]}\0{content or key[2]}".encode()).digest()
            self._masks[key] = mask
        return mask
