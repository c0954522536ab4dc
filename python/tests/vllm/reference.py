"""What a vLLM without a connector answers, and how sure it is of that."""

from __future__ import annotations

import json

from tests.vllm.process import Vllm

#: Lead in log-probability that the best token must have over the second best to be compared at all.
#: In 32-bit floats, another order of the same additions moves a logit by about 1e-5 at most.
SURE = 2e-4


class Reference:
    """Answers of an engine without a connector, with nothing cached."""

    def __init__(self, engine: Vllm) -> None:
        self.engine = engine
        self.answers: dict[str, list[list[int]]] = {}
        self.opened = False

    def outputs(self, prompts: list[list[int]], max_tokens: int = 16) -> list[list[int]]:
        """Greedy tokens of each prompt, up to its first close call.

        From a close call on, two right engines may differ, so nothing is said from there. That
        concerns one prompt in a hundred; if it were many, the comparison would prove nothing.
        """
        key = json.dumps([prompts, max_tokens])
        if key not in self.answers:
            if not self.opened:
                self.engine.open(enable_prefix_caching=False)
                self.opened = True
            answer = self.engine.run(prompts, max_tokens=max_tokens, with_leads=True)
            assert not answer.failed
            outputs = []
            for tokens, leads in zip(answer.tokens, answer.leads, strict=True):
                close = next((at for at, lead in enumerate(leads) if lead < SURE), len(tokens))
                outputs.append(tokens[:close])
            said = sum(map(len, outputs))
            assert said >= 0.95 * len(prompts) * max_tokens, f"{said} tokens are sure: too few"
            self.answers[key] = outputs
        return self.answers[key]


def differences(got: list[list[int]], wanted: list[list[int]]) -> list[int]:
    """Numbers of the prompts whose tokens are not those of the reference, as far as it is sure."""
    return [
        at
        for at, (tokens, sure) in enumerate(zip(got, wanted, strict=True))
        if tokens[: len(sure)] != sure
    ]
