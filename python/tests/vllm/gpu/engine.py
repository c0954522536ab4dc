"""The engine process of the measurements: `tests.vllm.engine` with commands that take time.

| command | what it does |
| --- | --- |
| `randomise` | gives the dummy model weights that make its output depend on its whole cache |
| `first` | milliseconds to the first token of one prompt, and how much of it was cached |
| `batch` | milliseconds until all of some prompts have their first, and their last token |
| `decode` | decodes some prompts while others come in; time from token to token |
| `settle` | returns when vLLM's own cache could be emptied: no block is in use any more |
| `pause` | the same small requests, and vLLM's own cache stays |
| `link` | GB/s of one large copy from pinned memory to the GPU |
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from tests.vllm.engine import Server, serve
from tests.vllm.gpu.weights import randomise_model


class Meter(Server):
    """The engine and a clock."""

    def randomise(self) -> dict[str, Any]:
        return {"parameters": self.llm.apply_model(randomise_model)[0]}

    def add(self, tokens: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        name = f"request-{self.requests}"
        self.requests += 1
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
        return name

    def first(self, prompt: list[int]) -> dict[str, Any]:
        engine = self.llm.llm_engine
        start = time.perf_counter()
        self.add(prompt, 1)
        cached = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                cached = output.num_cached_tokens
        return {"ms": 1e3 * (time.perf_counter() - start), "cached": cached}

    def batch(self, prompts: list[list[int]], max_tokens: int = 1) -> dict[str, Any]:
        engine = self.llm.llm_engine
        start = time.perf_counter()
        waiting = {self.add(prompt, max_tokens) for prompt in prompts}
        cached = 0
        firsts = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = 1e3 * (time.perf_counter() - start)
            for output in outputs:
                if output.request_id in waiting:
                    waiting.discard(output.request_id)
                    firsts.append(now)
                    cached += output.num_cached_tokens or 0
        end = 1e3 * (time.perf_counter() - start)
        return {"firsts_ms": firsts, "ms": end, "cached": cached}

    def decode(
        self, prompts: list[list[int]], max_tokens: int, visitors: list[list[int]], every: int
    ) -> dict[str, Any]:
        """After every so many tokens of the decoding prompts, one visitor asks for one token."""
        engine = self.llm.llm_engine
        seen = {self.add(prompt, max_tokens): 0 for prompt in prompts}
        times: dict[str, list[float]] = {name: [] for name in seen}
        left = list(visitors)
        cached = rounds = 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = 1e3 * time.perf_counter()
            for output in outputs:
                name = output.request_id
                if name not in seen:
                    cached += output.num_cached_tokens or 0
                    continue
                count = len(output.outputs[0].token_ids)
                times[name] += [now] * (count - seen[name])
                seen[name] = count
            furthest = max(seen.values())
            if left and furthest >= every * (rounds + 1):
                rounds += 1
                self.add(left.pop(0), 1)
        per_token = [(at[-1] - at[0]) / (len(at) - 1) for at in times.values()]
        gaps = sorted(later - earlier for at in times.values() for earlier, later in pairwise(at))
        return {
            "tpot_ms": sum(per_token) / len(per_token),
            "gap_p99_ms": gaps[len(gaps) * 99 // 100],
            "cached": cached,
            "left": len(left),
        }

    def settle(self, patience: float = 30.0) -> dict[str, Any]:
        """An idle engine may learn of ended saves only with the next step: small requests make
        some."""
        deadline = time.monotonic() + patience
        for number in range(10**6):
            self.small(number)
            if number >= 2 and self.llm.reset_prefix_cache():
                return {"settled": True}
            if time.monotonic() > deadline:
                break
        return {"settled": False}

    def pause(self) -> dict[str, Any]:
        for number in range(3):
            self.small(number)
        return {}

    def small(self, number: int) -> None:
        time.sleep(0.02)
        self.first([number % 1000 + 5] * 5)

    def link(self, size: int = 1 << 30) -> dict[str, Any]:
        import torch

        if not torch.cuda.is_available():
            return {"gbps": 1.0}
        source = torch.ones(size, dtype=torch.uint8).pin_memory()
        target = torch.empty(size, dtype=torch.uint8, device="cuda")
        rates = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            rates.append(size / begin.elapsed_time(end) / 1e6)
        return {"gbps": sorted(rates)[len(rates) // 2]}


if __name__ == "__main__":
    serve(Meter)
