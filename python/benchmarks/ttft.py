"""What the connector costs and saves: time to the first token, and prompts that never come back.

    pegaflowd --pool-size 16GiB &
    PYTHONHASHSEED=0 python benchmarks/ttft.py MODEL [--dummy] [--tokens 1000 10000] [--pairs 5]

Each engine is a process of its own. Cold and warm: a prompt of so many tokens, one output token;
"local" is the hit in vLLM's own cache, below which no connector can come; "warm" comes from the
node. Without reuse: 24 new prompts at once, in alternating pairs of engines without and with the
connector, so that a drift of the machine meets both; the spread of the pairs is printed with their
median. One line of JSON for each engine, a summary at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Prompts of the measurement without reuse, their length and output.
BATCH = 24


def arguments(line: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of the model")
    parser.add_argument("--dummy", action="store_true", help="random weights, no tokenizer")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 10000, 16000])
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each length")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of engines without reuse")
    parser.add_argument("--batch-tokens", type=int, default=2000, help="of a prompt without reuse")
    parser.add_argument("--output", type=int, default=64, help="tokens generated without reuse")
    parser.add_argument("--engine", choices=("plain", "pegaflow"), help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("ttft", "batch"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(line)


def engine(options: argparse.Namespace) -> None:
    """One engine, measured."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = None
    if options.engine == "pegaflow":
        transfer = KVTransferConfig(
            kv_connector="PegaKVConnector",
            kv_connector_module_path="pegaflow.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )
    more: dict[str, Any] = {"load_format": "dummy"} if options.dummy else {}
    llm = LLM(
        model=options.model,
        skip_tokenizer_init=True,
        max_model_len=max(*options.tokens, options.batch_tokens + options.output) + 64,
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config=transfer,
        **more,
    )
    measure = measure_ttft if options.what == "ttft" else measure_batch
    options.result.write_text(json.dumps(measure(llm, options)))


def prompt(chance: random.Random, tokens: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [chance.randrange(100, 2000) for _ in range(tokens)]}


def timed(llm: Any, prompts: list[dict[str, list[int]]], output: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return (time.perf_counter() - began) * 1e3


def forget(llm: Any) -> None:
    """Empties vLLM's own cache, once saves under way have ended."""
    while not llm.reset_prefix_cache():
        time.sleep(0.005)


def measure_ttft(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by length: cold, hit in vLLM's own cache, and from the node."""
    chance = random.Random(options.seed)
    timed(llm, [prompt(chance, min(options.tokens))], 1)
    found: dict[str, Any] = {}
    for tokens in options.tokens:
        cold, local, warm = [], [], []
        for _ in range(options.rounds):
            one = [prompt(chance, tokens)]
            forget(llm)
            cold.append(timed(llm, one, 1))
            local.append(timed(llm, one, 1))
            if options.engine == "pegaflow":
                forget(llm)
                warm.append(timed(llm, one, 1))
        found[str(tokens)] = {
            name: statistics.median(times)
            for name, times in (("cold", cold), ("local", local), ("warm", warm))
            if times
        }
    return found


def measure_batch(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds for prompts that nobody has seen."""
    chance = random.Random(options.seed)
    timed(llm, [prompt(chance, options.batch_tokens)], options.output)
    prompts = [prompt(chance, options.batch_tokens) for _ in range(BATCH)]
    forget(llm)
    return {"batch": timed(llm, prompts, options.output)}


def run(options: argparse.Namespace, which: str, what: str, seed: int) -> dict[str, Any]:
    """Measures in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        line = [
            sys.executable,
            __file__,
            options.model,
            "--engine",
            which,
            "--what",
            what,
            "--seed",
            str(seed),
            "--result",
            str(result),
            "--rounds",
            str(options.rounds),
            "--batch-tokens",
            str(options.batch_tokens),
            "--output",
            str(options.output),
            "--tokens",
            *map(str, options.tokens),
            *(["--dummy"] if options.dummy else []),
        ]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(result.read_text())
    print(json.dumps({"engine": which, "what": what, **found}), flush=True)
    return found


def main() -> None:
    """Measures all and prints a summary."""
    options = arguments(sys.argv[1:])
    if options.engine:
        engine(options)
        return
    # Prompts of an earlier run would be found.
    seed = int.from_bytes(os.urandom(4), "big")
    plain = run(options, "plain", "ttft", seed)
    ours = run(options, "pegaflow", "ttft", seed)
    shares = []
    for pair in range(options.pairs):
        order = ("plain", "pegaflow") if pair % 2 == 0 else ("pegaflow", "plain")
        times = {which: run(options, which, "batch", seed + 1 + pair) for which in order}
        shares.append(100 * (times["pegaflow"]["batch"] / times["plain"]["batch"] - 1))
    print(f"\n{'tokens':>8}{'plain cold':>12}{'cold':>10}{'warm':>10}{'local':>10}   (ms, medians)")
    for tokens in map(str, options.tokens):
        one = ours[tokens]
        print(
            f"{tokens:>8}{plain[tokens]['cold']:12.1f}{one['cold']:10.1f}{one['warm']:10.1f}"
            f"{one['local']:10.1f}"
        )
    if shares:
        print(
            f"{BATCH} prompts without reuse: {statistics.median(shares):+.2f} % with the connector,"
            f" median of {len(shares)} pairs, {min(shares):+.2f} to {max(shares):+.2f} %"
        )


if __name__ == "__main__":
    main()
