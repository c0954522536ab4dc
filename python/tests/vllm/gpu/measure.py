"""Takes the figures: one setup after the other beside an engine without a connector.

Both engines live at once and are measured in turn, so that what the machine does to one it does to
the other. Each result is printed as one line of JSON when it is there; the table comes last.

    python -m tests.vllm.gpu.measure --pack FOLDER [--setups pegaflow offloading] [--seconds 480]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.vllm.gpu.report import Results
from tests.vllm.gpu.setups import Engine, Settings, Setup, setups
from tests.vllm.process import Vllm

VOCABULARY = 150_000


class OutOfTimeError(Exception):
    """What is left has to be left out."""


class Bench:
    """One sitting."""

    def __init__(self, settings: Settings, results: Results, seconds: float, quick: bool) -> None:
        self.settings = settings
        self.results = results
        self.deadline = time.monotonic() + seconds
        self.quick = quick
        self.generator = random.Random(11)

    def prompt(self, tokens: int) -> list[int]:
        """Tokens that no prompt before had."""
        count = self.settings.scaled(tokens)
        return [self.generator.randrange(5, VOCABULARY) for _ in range(count)]

    def whole(self, tokens: int) -> int:
        """Tokens of such a prompt that a cache can give."""
        block = self.settings.block
        return (self.settings.scaled(tokens) - 1) // block * block

    def check_time(self, needed: float) -> None:
        if time.monotonic() + needed > self.deadline:
            raise OutOfTimeError(f"{needed:.0f} s are not left")

    # ------------------------------------------------------------ one measurement each

    def identity(self, none: Vllm, engine: Vllm, name: str) -> None:
        """Greedy tokens: cold against cold, and loaded against a hit in vLLM's own cache.

        In bfloat16 a prompt's last tokens, computed alone, round otherwise than in one go with
        all before them: vLLM without a connector shows that difference between its own cold and
        cached answers. So each answer is compared with the one that was computed in the same
        shapes, where every bit must agree.
        """
        prompts = [self.prompt(1003 + 611 * number) for number in range(4 if self.quick else 8)]

        def answers(from_engine: Vllm) -> list[list[int]]:
            return [from_engine.run([prompt], max_tokens=24).tokens[0] for prompt in prompts]

        cold_none, own_none = answers(none), answers(none)
        cold = answers(engine)
        settled = engine.call("settle")["settled"]
        warm = answers(engine)
        engine.call("settle")
        none.call("settle")

        def unequal(left: list[list[int]], right: list[list[int]]) -> int:
            return sum(one != other for one, other in zip(left, right, strict=True))

        self.results.add(
            name,
            "identity",
            prompts=len(prompts),
            settled=settled,
            cold_differs=unequal(cold, cold_none),
            warm_differs=unequal(warm, own_none),
            vllm_cold_against_cached=unequal(cold_none, own_none),
            distinct_answers=len({tuple(answer) for answer in cold_none}),
        )

    def ttft(self, none: Vllm, engine: Vllm, name: str, tokens: int, times: int) -> None:
        """First token of one prompt: cold, from vLLM's own cache, from the connector."""
        for _ in range(times):
            prompt = self.prompt(tokens)
            figures: dict[str, Any] = {"tokens": tokens}
            figures["none_cold"] = none.call("first", prompt=prompt)["ms"]
            none_own = none.call("first", prompt=prompt)
            figures["none_own"] = none_own["ms"]
            figures["cold"] = engine.call("first", prompt=prompt)["ms"]
            figures["own"] = engine.call("first", prompt=prompt)["ms"]
            engine.call("settle")
            warm = engine.call("first", prompt=prompt)
            figures["warm"] = warm["ms"]
            # A connector that could not give all blocks is not measured as if it had.
            figures["hit"] = min(warm["cached"], none_own["cached"]) >= self.whole(tokens)
            figures["moved"] = self.whole(tokens) * self.settings.bytes_per_token
            self.results.add(name, "ttft", **figures)

    def at_once(self, none: Vllm, engine: Vllm, name: str, count: int, tokens: int) -> None:
        """Many prompts at once, all loaded: until the last of them has its first token."""
        prompts = [self.prompt(tokens) for _ in range(count)]
        none.call("batch", prompts=prompts)
        none_own = none.call("batch", prompts=prompts)
        cold = engine.call("batch", prompts=prompts)
        settled = engine.call("settle")["settled"]
        warm = engine.call("batch", prompts=prompts)
        engine.call("settle")
        none.call("settle")
        self.results.add(
            name,
            "at once",
            count=count,
            tokens=tokens,
            cold=cold["ms"],
            warm=warm["ms"],
            warm_mean=sum(warm["firsts_ms"]) / count,
            none_own=none_own["ms"],
            settled=settled,
            hit=warm["cached"] >= count * self.whole(tokens),
            moved=count * self.whole(tokens) * self.settings.bytes_per_token,
        )

    def no_reuse(self, none: Vllm, engine: Vllm, name: str, pairs: int) -> None:
        """24 prompts that nobody has seen: what saving them costs. Which goes first alternates."""
        for pair in range(pairs):
            self.check_time(25)
            prompts = [self.prompt(10_000) for _ in range(24)]
            took: dict[str, float] = {}
            order: list[tuple[str, Vllm]] = [("without", none), ("with", engine)]
            for label, one in order if pair % 2 == 0 else reversed(order):
                took[label] = one.call("batch", prompts=prompts, max_tokens=64)["ms"]
                one.call("settle")
            self.results.add(name, "no reuse", pair=pair, **took)

    def decode(self, none: Vllm, engine: Vllm, name: str, times: int) -> None:
        """Time per token of 16 decodes while prompts of 10,000 tokens are loaded, or saved."""
        for _ in range(times):
            self.check_time(25)
            decoding = [self.prompt(500) for _ in range(16)]
            visitors = [self.prompt(10_000) for _ in range(6)]
            both = (none, engine)
            # Saving: both compute the visitors, one saves them too.
            saving = [
                one.call("decode", prompts=decoding, max_tokens=160, visitors=visitors, every=20)
                for one in both
            ]
            # Loading: one finds the visitors in its own cache, the other loads them.
            engine.call("settle")
            others = [self.prompt(500) for _ in range(16)]
            loading = [
                one.call("decode", prompts=others, max_tokens=160, visitors=visitors, every=20)
                for one in both
            ]
            engine.call("settle")
            none.call("settle")
            for what, (without, with_it) in (("saving", saving), ("loading", loading)):
                self.results.add(
                    name,
                    f"decode while {what}",
                    without=without["tpot_ms"],
                    with_=with_it["tpot_ms"],
                    without_p99=without["gap_p99_ms"],
                    with_p99=with_it["gap_p99_ms"],
                    cached=with_it["cached"],
                    left=with_it["left"] + without["left"],
                )

    # ------------------------------------------------------------ a setup

    def measure(self, none: Vllm, setup: Setup) -> None:
        """Everything about one setup; what fails is said and does not stop the rest."""
        ours = setup.name == "pegaflow"
        name = setup.name
        times = 3 if self.quick else 6
        with setup.serving():
            begin = time.monotonic()
            engine = setup.start()
            self.results.add(name, "init", seconds=time.monotonic() - begin)
            with engine:
                # Kernels are compiled and memory is mapped before anything counts.
                for one in (none, engine):
                    one.call("first", prompt=self.prompt(10_000))
                    one.call("batch", prompts=[self.prompt(2_000)] * 4, max_tokens=8)
                    one.call("settle")
                parts: list[Callable[[], None]] = [
                    lambda: self.identity(none, engine, name),
                    lambda: self.ttft(none, engine, name, 10_000, times),
                    lambda: self.ttft(none, engine, name, 1_000, times),
                    lambda: self.ttft(none, engine, name, 16_000, times if ours else 3),
                    lambda: self.at_once(none, engine, name, 32, 4_000),
                    lambda: self.no_reuse(none, engine, name, (6 if ours else 2)),
                    lambda: self.decode(none, engine, name, 3 if ours else 1),
                ]
                for part in parts:
                    self.guarded(name, part)

    def guarded(self, name: str, part: Callable[[], None]) -> None:
        try:
            self.check_time(15)
            part()
        except OutOfTimeError as late:
            self.results.add(name, "left out", why=str(late))
        except Exception as error:
            traceback.print_exc()
            self.results.add(name, "failed", error=str(error)[:2000])

    def sitting(self, all_setups: dict[str, Setup], wanted: list[str]) -> None:
        none = all_setups["none"]
        with Engine(none, "link", multiprocess=True) as copier:
            self.results.add("machine", "link", gbps=copier.call("link")["gbps"])
        begin = time.monotonic()
        with none.start() as without:
            self.results.add("none", "init", seconds=time.monotonic() - begin)
            for name in wanted:
                self.guarded(name, partial(self.measure, without, all_setups[name]))


def main() -> int:
    parser = argparse.ArgumentParser(description="measure vLLM with and without connectors")
    parser.add_argument("--pack", type=Path, required=True, help="folder of the unpacked pack")
    parser.add_argument("--folder", type=Path, help="for logs [a temporary one]")
    parser.add_argument(
        "--setups", nargs="+", default=["pegaflow", "offloading", "public pegaflow"]
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="stop taking new figures then")
    parser.add_argument("--kv-gib", type=int, default=38, help="KV cache of each engine")
    parser.add_argument("--pool-gib", type=int, default=32, help="pool of each connector")
    parser.add_argument(
        "--runner", type=int, choices=(1, 2), help="vLLM's model runner [vLLM's choice]"
    )
    parser.add_argument("--quick", action="store_true", help="half the repetitions")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pegaflow-vllm-"))
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        pack=options.pack,
        folder=folder,
        python=sys.executable,
        kv_bytes=options.kv_gib << 30,
        pool_bytes=options.pool_gib << 30,
        rehearsal=options.rehearse,
        runner=options.runner,
    )
    results = Results(lambda line: print(json.dumps(line), flush=True))
    bench = Bench(settings, results, options.seconds, options.quick)
    try:
        bench.sitting(setups(settings), options.setups)
    finally:
        print(results.table(), flush=True)
        print(f"logs: {folder}")
    return 1 if results.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
