"""Names of blocks: vLLM's hashes, and what a mask makes of them."""

from __future__ import annotations

from hashlib import sha256

import pytest

from pegaflow.connector.names import packed

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
