"""Prompts, drawn from seeds: the same in every process and every run."""

from __future__ import annotations

import random

from tests.vllm.model import VOCABULARY

#: The first tokens have a meaning of their own.
LOWEST = 3


def tokens(generator: random.Random, count: int) -> list[int]:
    """So many tokens."""
    return [generator.randrange(LOWEST, VOCABULARY) for _ in range(count)]


def families(
    count: int,
    *,
    seed: int,
    each: int = 10,
    prefix: tuple[int, int] = (100, 400),
    suffix: tuple[int, int] = (1, 150),
) -> list[list[int]]:
    """`count` prompts in families of `each` that share a prefix, in an order that mixes them.

    Lengths of prefixes and of what follows them lie in the given ranges, so that most prefixes end
    inside a block.
    """
    generator = random.Random(seed)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        shared = tokens(generator, generator.randint(*prefix))
        prompts += [
            shared + tokens(generator, generator.randint(*suffix))
            for _ in range(min(each, count - len(prompts)))
        ]
    generator.shuffle(prompts)
    return prompts


def reusable(prompt: list[int], block: int) -> int:
    """Tokens of a prompt that a cache can give it: whole blocks, but never its last token."""
    return (len(prompt) - 1) // block * block
