"""Answers that are compared token by token, and what shows that a wrong cache would change them."""

from __future__ import annotations

#: The first tokens have a meaning of their own.
LOWEST = 5
#: Tokens that are replaced.
SPAN = 16


def differing(left: list[list[int]], right: list[list[int]]) -> int:
    """How many answers are not the same."""
    return sum(one != other for one, other in zip(left, right, strict=True))


def altered(prompt: list[int], vocabulary: int) -> list[int]:
    """The same prompt, with other tokens in its middle: it has to be answered otherwise."""
    middle = len(prompt) // 2
    tokens = prompt[middle : middle + SPAN]
    others = [LOWEST + (token + 77) % (vocabulary - LOWEST) for token in tokens]
    return prompt[:middle] + others + prompt[middle + SPAN :]
