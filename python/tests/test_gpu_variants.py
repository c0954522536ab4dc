"""What the comparison of answers on GPUs takes for right: it runs where no test does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.gpu.answers import altered
from tests.vllm.gpu.variants import VARIANTS, VOCABULARY, is_right, prompts

RIGHT: dict[str, Any] = {
    "prompts": 2,
    "settled": True,
    "cold_against_own": 1,
    "loaded_differs": 0,
    "restarted_differs": 0,
    "altered_differs": 2,
    "own_cached": [128, 736],
    "loaded_cached": [128, 736],
    "restarted_cached": [128, 736],
}


def test_rounding_between_cold_and_cached_answers_is_right() -> None:
    assert is_right(RIGHT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"settled": False},
        {"loaded_differs": 1},
        {"restarted_differs": 1},
        {"altered_differs": 1},
        {"loaded_cached": [128, 720]},
        {"restarted_cached": [0, 0]},
        {"own_cached": [0, 0], "loaded_cached": [0, 0], "restarted_cached": [0, 0]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_single_defect_is_wrong(wrong: dict[str, Any]) -> None:
    assert not is_right(RIGHT | wrong)


def test_a_prompt_is_altered_in_its_middle_alone() -> None:
    for prompt in prompts():
        other = altered(prompt, VOCABULARY)
        pairs = enumerate(zip(prompt, other, strict=True))
        changed = [at for at, (one, two) in pairs if one != two]
        middle = len(prompt) // 2
        assert changed == list(range(middle, middle + 16))


def test_every_variant_has_a_name_of_its_own() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
