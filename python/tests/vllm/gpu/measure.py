"""Takes the figures: vLLM without a connector, with this project's, and with its peers', in turn.

All engines live at once, and all but the one whose turn it is stand still (SIGSTOP), so that each
has the machine to itself and what the machine does to one it does to the others a few seconds
later. Every part goes round several times, and the order of the turns is reversed each time. Each
result is printed as one line of JSON when it is there; the table comes last.

    python -m tests.vllm.gpu.measure --pack FOLDER [--setups pegaflow offloading] [--seconds 480]
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.vllm.gpu.answers import LOWEST, altered, differing
from tests.vllm.gpu.report import Results
from tests.vllm.gpu.setups import Engine, Settings, Setup, command_line, log_folder, setups
from tests.vllm.process import EngineError

VOCABULARY = 150_000
PARTS = ("identity", "ttft", "no-reuse", "decode", "at-once")
NONE = "none"
OURS = "pegaflow"
#: Measured at the end, in the place of the peers: ours in other shapes.
LATE = ("pegaflow-layers", "pegaflow-served")


class OutOfTimeError(Exception):
    """What is left has to be left out."""


class Bench:
    """One sitting."""

    def __init__(self, settings: Settings, results: Results, seconds: float, rounds: int) -> None:
        self.settings = settings
        self.results = results
        self.deadline = time.monotonic() + seconds
        self.most_rounds = rounds
        self.generator = random.Random(11)
        self.engines: dict[str, Engine] = {}

    # ------------------------------------------------------------ prompts

    def prompt(self, tokens: int) -> list[int]:
        """Tokens that no prompt before had."""
        count = self.settings.scaled(tokens)
        return [self.generator.randrange(LOWEST, VOCABULARY) for _ in range(count)]

    def whole(self, tokens: int) -> int:
        """Tokens of such a prompt that a cache can give."""
        block = self.settings.block
        return (self.settings.scaled(tokens) - 1) // block * block

    def moved(self, tokens: int) -> int:
        """Bytes that a connector loads for such a prompt."""
        return self.whole(tokens) * self.settings.bytes_per_token

    # ------------------------------------------------------------ turns

    def check_time(self, needed: float) -> None:
        if time.monotonic() + needed > self.deadline:
            raise OutOfTimeError(f"{needed:.0f} s are not left")

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[Engine]:
        """Everything else stands still. What slept is warmed up first. What fails is out."""
        engine = self.engines[name]
        try:
            engine.wake()
            engine.call("batch", prompts=[self.prompt(3_000)] * 2, max_tokens=4)
            engine.call("settle")
            yield engine
            engine.call("settle")
            engine.sleep()
        except EngineError as error:
            traceback.print_exc()
            self.results.add("machine", "failed", part=name, error=str(error)[:2000])
            self.stop([name])
            if name == NONE:
                raise OutOfTimeError("there is nothing to compare with") from error

    def turns(self, part: int, names: Sequence[str]) -> list[str]:
        """Those of the names that are alive, in this round's order."""
        alive = [name for name in names if name in self.engines]
        return alive if part % 2 == 0 else alive[::-1]

    # ------------------------------------------------------------ one round each

    def identity(self, names: Sequence[str]) -> None:
        """Greedy tokens: cold against cold, and loaded against a hit in vLLM's own cache.

        In bfloat16 a prompt's last tokens, computed alone, round otherwise than in one go with
        all before them: vLLM without a connector shows that difference between its own cold and
        cached answers. So each answer is compared with the one that was computed in the same
        shapes, where every bit must agree.
        """
        prompts = [self.prompt(1003 + 611 * number) for number in range(8)]

        def answers(engine: Engine) -> list[list[int]]:
            return [engine.run([prompt], max_tokens=16).tokens[0] for prompt in prompts]

        with self.turn(NONE) as none:
            cold_none, own_none = answers(none), answers(none)
            # Computed in the same shapes as the first answers: nothing is cached under this salt.
            cold_others = [
                none.run([altered(prompt, VOCABULARY)], max_tokens=16, cache_salt="other").tokens[0]
                for prompt in prompts
            ]
        for name in self.turns(0, names):
            with self.turn(name) as engine:
                cold = answers(engine)
                settled = engine.call("settle")["settled"]
                warm = answers(engine)
                self.results.add(
                    name,
                    "identity",
                    prompts=len(prompts),
                    settled=settled,
                    cold_differs=differing(cold, cold_none),
                    warm_differs=differing(warm, own_none),
                    vllm_cold_against_cached=differing(cold_none, own_none),
                    altered_differs=differing(cold_none, cold_others),
                )

    def first_tokens(self, part: int, names: Sequence[str]) -> None:
        """First token of one prompt: cold, from the connector, from vLLM's own cache."""
        prompts = [
            (tokens, self.prompt(tokens)) for tokens in (10_000, 1_000, 16_000, 10_000, 1_000)
        ]
        for name in self.turns(part, names):
            with self.turn(name) as engine:
                for tokens, prompt in prompts:
                    figures: dict[str, Any] = {"tokens": tokens, "moved": self.moved(tokens)}
                    figures["cold"] = engine.call("first", prompt=prompt)["ms"]
                    if name != NONE:
                        engine.call("settle")
                        loaded = engine.call("first", prompt=prompt)
                        figures["warm"] = loaded["ms"]
                        # What could not give all blocks is not measured as if it had.
                        figures["hit"] = loaded["cached"] >= self.whole(tokens)
                    # Right behind another one a hit is faster than after the rest before a load.
                    engine.call("pause")
                    figures["own"] = engine.call("first", prompt=prompt)["ms"]
                    self.results.add(name, "ttft", part=part, **figures)

    def at_once(self, part: int, names: Sequence[str]) -> None:
        """32 prompts at once, which all fit: until the last of them has its first token."""
        count, tokens = 32, 2_500
        prompts = [self.prompt(tokens) for _ in range(count)]
        for name in self.turns(part, names):
            figures: dict[str, Any] = {"count": count, "tokens": tokens}
            figures["moved"] = count * self.moved(tokens)
            with self.turn(name) as engine:
                figures["cold"] = engine.call("batch", prompts=prompts)["ms"]
                if name == NONE:
                    figures["own"] = engine.call("batch", prompts=prompts)["ms"]
                else:
                    engine.call("settle")
                    warm = engine.call("batch", prompts=prompts)
                    figures["warm"] = warm["ms"]
                    figures["warm_mean"] = sum(warm["firsts_ms"]) / count
                    figures["hit"] = warm["cached"] >= count * self.whole(tokens)
                self.results.add(name, "at once", part=part, **figures)

    def no_reuse(self, part: int, names: Sequence[str]) -> None:
        """24 prompts that nobody has seen: what saving them costs."""
        prompts = [self.prompt(10_000) for _ in range(24)]
        for name in self.turns(part, names):
            with self.turn(name) as engine:
                took = engine.call("batch", prompts=prompts, max_tokens=64)["ms"]
                self.results.add(name, "no reuse", part=part, ms=took)

    def decode(self, part: int, names: Sequence[str]) -> None:
        """Time per token of 16 decodes while prompts of 10,000 tokens are saved, then loaded.

        Without a connector the same prompts are computed, then found in vLLM's own cache.
        """
        decoding, others = ([self.prompt(500) for _ in range(16)] for _ in range(2))
        visitors = [self.prompt(10_000) for _ in range(4)]
        arguments = {"max_tokens": 120, "visitors": visitors, "every": 20}
        for name in self.turns(part, names):
            with self.turn(name) as engine:
                saving = engine.call("decode", prompts=decoding, **arguments)
                if name != NONE:
                    engine.call("settle")
                loading = engine.call("decode", prompts=others, **arguments)
                for what, figures in (("saving", saving), ("loading", loading)):
                    del figures["event"]
                    self.results.add(name, f"decode while {what}", part=part, **figures)

    # ------------------------------------------------------------ all of it

    def rounds(
        self,
        count: int,
        needed: float,
        measure: Callable[[int, Sequence[str]], None],
        every: Sequence[str],
        second: Sequence[str] = (),
    ) -> None:
        """Some rounds, of which every third one is also for some more setups."""
        for part in range(min(count, self.most_rounds)):
            names = [*every, *second] if part % 3 == 0 else list(every)
            if not self.guarded(measure.__name__, needed * len(names), measure, part, names):
                return

    def guarded(
        self, what: str, needed: float, measure: Callable[..., None], *arguments: Any
    ) -> bool:
        """What is left out is said."""
        try:
            self.check_time(needed)
            measure(*arguments)
        except OutOfTimeError as late:
            self.results.add("machine", "left out", part=what, why=str(late))
            return False
        return True

    def start(self, wanted: Sequence[Setup], servers: contextlib.ExitStack) -> None:
        """Starts engines side by side, each of which then stands still."""
        long, short = self.prompt(16_000), self.prompt(1_000)

        def begin(setup: Setup) -> None:
            began = time.monotonic()
            try:
                servers.enter_context(setup.serving())
                engine = setup.start()
                # Kernels are compiled and memory is mapped before anything counts.
                for prompt in (long, short):
                    engine.call("batch", prompts=[prompt] * 2, max_tokens=8)
                engine.call("settle")
                engine.sleep()
            except (EngineError, RuntimeError) as error:
                what = f"{setup.name} init"
                self.results.add("machine", "failed", part=what, error=str(error)[:2000])
            else:
                self.engines[setup.name] = engine
                self.results.add(setup.name, "init", seconds=time.monotonic() - began)

        with ThreadPoolExecutor(len(wanted)) as pool:
            for one in [pool.submit(begin, setup) for setup in wanted]:
                one.result()

    def stop(self, names: Sequence[str]) -> None:
        """Ends engines, which gives their memory back."""
        for name in names:
            engine = self.engines.pop(name, None)
            if engine is not None:
                engine.kill()

    def sitting(
        self, all_setups: dict[str, Setup], wanted: Sequence[str], parts: Sequence[str]
    ) -> None:
        peers = [name for name in wanted if name != OURS and name not in LATE]
        late = [name for name in wanted if name in LATE]
        pair = [name for name in (NONE, OURS) if name == NONE or name in wanted]
        with Engine(all_setups[NONE], "link", multiprocess=False) as copier:
            self.results.add("machine", "link", gbps=copier.call("link")["gbps"])
        with contextlib.ExitStack() as servers:
            try:
                self.start([all_setups[name] for name in (*pair, *peers)], servers)
                if any(name not in self.engines for name in pair):
                    return
                if "identity" in parts:
                    self.guarded("identity", 20, self.identity, pair[1:])
                if "ttft" in parts:
                    self.rounds(5, 4, self.first_tokens, [*pair, *peers])
                if "no-reuse" in parts:
                    self.rounds(6, 11, self.no_reuse, pair, peers)
                if "decode" in parts:
                    self.rounds(8, 9, self.decode, pair, peers)
                if "at-once" in parts:
                    self.rounds(2, 5, self.at_once, [*pair, *peers])
                if late and self.guarded("late", 70, self.stop, peers):
                    self.start([all_setups[name] for name in late], servers)
                    self.rounds(4, 4, self.first_tokens, [*pair, *late])
            finally:
                self.stop(list(self.engines))


def main() -> int:
    parser = command_line("measure vLLM with and without connectors")
    parser.add_argument("--setups", nargs="+", default=[OURS, "offloading", "public", *LATE])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=480.0, help="start no new round then")
    parser.add_argument("--rounds", type=int, default=8, help="most rounds of each part")
    parser.add_argument("--kv-gib", type=int, default=12, help="KV cache of each engine")
    parser.add_argument("--pool-gib", type=int, default=20, help="pool of each connector")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs for decode steps")
    parser.add_argument("--served", action="store_true", help="engines in their own processes")
    options = parser.parse_args()
    folder = log_folder(options)
    settings = Settings(
        pack=options.pack,
        folder=folder,
        python=sys.executable,
        kv_bytes=options.kv_gib << 30,
        pool_bytes=options.pool_gib << 30,
        rehearsal=options.rehearse,
        graphs=options.graphs,
        served=options.served,
    )
    began = time.monotonic()
    results = Results(
        lambda line: print(
            json.dumps({"at": round(time.monotonic() - began, 1)} | line), flush=True
        )
    )
    bench = Bench(settings, results, options.seconds, options.rounds)
    try:
        bench.sitting(setups(settings), options.setups, options.parts)
    finally:
        print(results.table(), flush=True)
        print(f"logs: {folder}")
    return 1 if results.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
