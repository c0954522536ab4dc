"""The daemon dies, returns, freezes, or comes after vLLM: requests go on and hits come back."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.place import Place, connector
from tests.vllm.process import Outcome, Vllm, outcome
from tests.vllm.prompts import families, reusable
from tests.vllm.reference import Reference, differences

EXTERNAL = "vllm:external_prefix_cache_hits"

#: What the log says of the two transitions, once for each process's session.
LOST = re.compile(r"the daemon is away: .*")
FOUND = re.compile(r"connected to .* after [\d.]+ s without a daemon")
#: Sessions of an engine with one rank: its scheduler's and its worker's.
SESSIONS = 2


def run_with(
    engine: Vllm, prompts: list[list[int]], actions: dict[int, Callable[[], object]]
) -> Outcome:
    """Runs the prompts; when so many have ended, does what stands there."""
    for reply in engine.events("run", prompts=prompts):
        if reply["event"] == "done":
            return outcome(reply)
        if reply["ended"] in actions:
            actions[reply["ended"]]()
    raise AssertionError("the run has no end")


@pytest.mark.parametrize("multiprocess", [False, True], ids=["one process", "engine core apart"])
def test_kill_and_return_of_the_daemon_in_a_run_of_200_requests(
    reference: Reference, daemon: Daemon, vllm: Callable[..., Vllm], multiprocess: bool
) -> None:
    prompts = families(200, seed=50, prefix=(100, 300), suffix=(1, 100))
    wanted = reference.outputs(prompts, max_tokens=16)
    engine = vllm("survivor", multiprocess=multiprocess)
    # A cache that holds few of the prompts, so that there are saves and loads all along.
    engine.open(num_gpu_blocks_override=150, max_num_seqs=8, kv_transfer_config=connector())
    result = run_with(engine, prompts, {60: daemon.kill, 120: daemon.start})
    assert result.failed == []
    assert differences(result.tokens, wanted) == []

    # Hits come back without restarting vLLM, from what was saved before the kill and after it.
    daemon.settle()
    assert engine.reset()
    before = engine.metrics()[EXTERNAL]
    again = engine.run(prompts[:20] + prompts[-20:])
    assert differences(again.tokens, wanted[:20] + wanted[-20:]) == []
    metrics = engine.metrics()
    assert metrics[EXTERNAL] > before
    assert metrics["vllm:pegaflow_daemon_losses"] == SESSIONS
    assert metrics["vllm:pegaflow_daemon_returns"] == SESSIONS
    log = engine.log()
    assert len(LOST.findall(log)) == SESSIONS, "the log says once that the daemon is away"
    assert len(FOUND.findall(log)) == SESSIONS, "the log says once that it is back"


def test_vllm_before_its_daemon(
    reference: Reference, place: Place, vllm: Callable[..., Vllm]
) -> None:
    prompts = families(30, seed=51, each=5)
    wanted = reference.outputs(prompts)
    engine = vllm("first")
    engine.open(kv_transfer_config=connector())
    assert differences(engine.run(prompts).tokens, wanted) == []
    assert engine.metrics()[EXTERNAL] == 0
    with Daemon(place) as daemon:
        daemon.start()
        prompt = prompts[0]

        def hits() -> bool:
            """Saves the prompt's blocks if they are not saved yet, and asks for them."""
            assert engine.reset()
            before = engine.metrics()[EXTERNAL]
            assert differences(engine.run([prompt]).tokens, wanted[:1]) == []
            return engine.metrics()[EXTERNAL] - before == reusable(prompt, 32)

        daemon.wait_for("the first hit", hits)
        assert differences(engine.run(prompts).tokens, wanted) == []
