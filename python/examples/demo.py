"""What `make demo-vllm` shows: a real vLLM on the CPU, with a tiny random model and a daemon of its
own. A first engine computes every prompt and ends; a second one, started anew, loads them.

    PEGAFLOW_BIN_DIR=target/debug python -m examples.demo     # from python/, with vLLM installed

Fails if an output differs, or if other blocks were loaded than can be.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 32
PROMPTS = 16
OUTPUT_TOKENS = 16
VOCABULARY = 2048
#: Enough for a tiny model on a small machine that others use too.
SETTINGS = {
    "PYTHONHASHSEED": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def prompts() -> list[list[int]]:
    """Prompts with common beginnings, as of several turns of a few conversations."""
    chance = random.Random(1)
    begun = [[chance.randrange(3, VOCABULARY) for _ in range(320)] for _ in range(4)]
    return [
        begun[at % len(begun)] + [chance.randrange(3, VOCABULARY) for _ in range(40 + 12 * at)]
        for at in range(PROMPTS)
    ]


def loadable() -> int:
    """Tokens that a new engine can load of them, one prompt after the other: all whole blocks but
    the last token's, less what it has by then itself."""
    known: set[tuple[int, ...]] = set()
    total = 0
    for prompt in prompts():
        whole = (len(prompt) - 1) // BLOCK_TOKENS
        heads = [tuple(prompt[: at * BLOCK_TOKENS]) for at in range(1, whole + 1)]
        total += BLOCK_TOKENS * sum(head not in known for head in heads)
        known.update(heads)
    return total


def engine(model: str, answers: str) -> None:
    """One engine: answers all prompts, one by one, and writes down what came out."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = None
    if os.environ.get("PEGAFLOW_SOCKET"):
        transfer = KVTransferConfig(
            kv_connector="PegaKVConnector",
            kv_connector_module_path="pegaflow.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=1024,
        enforce_eager=True,
        block_size=BLOCK_TOKENS,
        num_gpu_blocks_override=256,
        disable_log_stats=False,
        kv_transfer_config=transfer,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False
    )
    began = time.perf_counter()
    tokens = [
        list(
            llm.generate([{"prompt_token_ids": one}], sampling, use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )
        for one in prompts()
    ]
    took = time.perf_counter() - began
    # Saves under way end before the engine does.
    while not llm.reset_prefix_cache():
        time.sleep(0.01)
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    said = {
        name: found.get(f"vllm:{name}", 0)
        for name in (
            "external_prefix_cache_hits",
            "pegaflow_saved_blocks",
            "pegaflow_loaded_blocks",
        )
    }
    Path(answers).write_text(json.dumps({"tokens": tokens, "seconds": took, **said}))


def run(folder: Path, name: str, environment: dict[str, str]) -> dict[str, Any]:
    """Runs an engine in a process of its own."""
    print(f"==> {name}", flush=True)
    answers, log = folder / f"{name}.json", folder / f"{name}.log"
    with log.open("w") as output:
        status = subprocess.run(
            [sys.executable, "-m", "examples.demo", str(folder / "model"), str(answers)],
            env={**os.environ, **SETTINGS, **environment},
            stdout=output,
            stderr=output,
            check=False,
        ).returncode
    if status:
        print(log.read_text()[-8000:])
        sys.exit(f"the engine failed with status {status}")
    told: dict[str, Any] = json.loads(answers.read_text())
    return told


def main() -> None:
    """The demonstration."""
    binaries = Path(os.environ["PEGAFLOW_BIN_DIR"]).resolve()
    node = f"demo-vllm-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="pegaflow-demo-") as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, "-m", "tests.vllm.model", str(folder / "model")], check=True
        )
        plain = run(folder, "without a connector", {"PEGAFLOW_SOCKET": ""})
        socket = folder / "daemon.sock"
        daemon = subprocess.Popen(
            [
                binaries / "pegaflowd",
                "--node",
                node,
                "--socket",
                socket,
                "--pool-size",
                "256MiB",
                "--extent-size",
                "4MiB",
                "--http",
                "off",
            ],
            stdout=(folder / "daemon.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        try:
            there = {
                "PEGAFLOW_NODE": node,
                "PEGAFLOW_SOCKET": str(socket),
                "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
                "PEGAFLOW_LIBRARY": str(binaries / "libpegaflow.so"),
            }
            cold = run(folder, "cold: an empty cache", there)
            warm = run(folder, "warm: vLLM started anew", there)
            table(plain, cold, warm)
            pegactl = binaries / "pegactl"
            subprocess.run([pegactl, "--node", node, "status"], check=True)
            subprocess.run([pegactl, "--node", node, "cache"], check=True)
            verify(plain, cold, warm)
        finally:
            daemon.terminate()
            daemon.wait(30)
            left = Path(os.environ.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow")) / node
            subprocess.run(["rm", "-rf", left], check=True)


def table(plain: dict[str, Any], cold: dict[str, Any], warm: dict[str, Any]) -> None:
    """What the engines did."""
    print(f"\n{'':24}{'plain':>10}{'cold':>10}{'warm':>10}")
    for label, key, form in (
        ("seconds", "seconds", "10.2f"),
        ("tokens loaded", "external_prefix_cache_hits", "10.0f"),
        ("blocks saved", "pegaflow_saved_blocks", "10.0f"),
        ("blocks loaded", "pegaflow_loaded_blocks", "10.0f"),
    ):
        print(f"{label:24}" + "".join(format(one[key], form) for one in (plain, cold, warm)))
    print(flush=True)


def verify(plain: dict[str, Any], cold: dict[str, Any], warm: dict[str, Any]) -> None:
    """Ends with an error if anything is not as it must be."""
    wrong = []
    if not plain["tokens"] == cold["tokens"] == warm["tokens"]:
        wrong.append("outputs differ")
    if cold["external_prefix_cache_hits"]:
        wrong.append("the cold engine loaded something")
    if warm["external_prefix_cache_hits"] != loadable():
        wrong.append(f"{warm['external_prefix_cache_hits']} tokens loaded, not {loadable()}")
    if wrong:
        sys.exit("; ".join(wrong))
    print(f"all outputs are the same, and {loadable()} tokens were loaded, as they must be")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        engine(sys.argv[1], sys.argv[2])
    else:
        main()
