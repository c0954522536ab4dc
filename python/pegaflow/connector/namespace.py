"""The namespace: everything that gives a block's bytes their meaning.

What differs from request to request (LoRA adapter, `cache_salt`, multimodal input) is not here:
vLLM's block hashes contain it. The sizes of all segments of all ranks are added by the daemon.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pegaflow.client import Namespace

#: The daemon's limit for one text of a namespace.
MAX_TEXT = 1024


@dataclass(frozen=True)
class HashSeed:
    """What vLLM's block hashes begin with."""

    #: Equal in all processes that share blocks; None if each process has its own.
    value: str | None
    #: How to get a fixed one.
    fix: str = ""


def facts_text(facts: Mapping[str, object]) -> str:
    """Facts as one text: `name=value` in the order given, without those that are None.

    A text that the daemon would refuse for its length is replaced by its digest.
    """
    text = ";".join(f"{name}={value}" for name, value in facts.items() if value is not None)
    if len(text.encode()) <= MAX_TEXT:
        return text
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def hash_text(algorithm: str, seed: HashSeed, engine_id: str) -> str:
    """Algorithm and seed of the block hashes. With a random seed nobody else's names mean the same
    blocks, so the engine's own id is the seed's name."""
    if seed.value is None:
        return f"{algorithm};seed=random;engine={engine_id}"
    return f"{algorithm};seed={hashlib.sha256(seed.value.encode()).hexdigest()[:16]}"


def to_wire(namespace: Namespace) -> dict[str, str | int | None]:
    """For the way from a worker to the scheduler."""
    return asdict(namespace)


def from_wire(wire: Mapping[str, str | int | None]) -> Namespace:
    """What `to_wire` made."""
    return Namespace(**wire)  # type: ignore[arg-type]
