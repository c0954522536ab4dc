"""One process of a real vLLM, driven by lines of JSON; runs in vLLM's environment.

Reads one command a line from standard input and answers on the descriptor that its argument names:
`{"event": "progress", ...}` any number of times, then `{"event": "done", ...}` or
`{"event": "failed", "error": TEXT}`. Standard output and error are vLLM's log.

| command | what it does |
| --- | --- |
| `open` | makes the engine, with the arguments of `vllm.LLM` |
| `run` | runs prompts to their ends; reports each that ends |
| `reset` | empties vLLM's own prefix cache; tells whether vLLM could (no block is in use) |
| `metrics` | vLLM's metrics, summed over their labels |
| `script` | runs a Python file as a program; tells what it printed |
| `close` | drops the engine, so that another can be opened in this process |
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import runpy
import sys
import time
import traceback
from typing import Any, TextIO


class Server:
    """The engine and the commands on it."""

    def __init__(self, replies: TextIO) -> None:
        self.replies = replies
        self.llm: Any = None
        self.requests = 0

    def reply(self, event: str, **fields: Any) -> None:
        self.replies.write(json.dumps({"event": event, **fields}) + "\n")
        self.replies.flush()

    def open(self, arguments: dict[str, Any]) -> dict[str, Any]:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = arguments.pop("kv_transfer_config", None)
        if transfer is not None:
            arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
        self.llm = LLM(**arguments)
        return {}

    def run(
        self,
        prompts: list[list[int]],
        max_tokens: int = 16,
        aborts: list[int] | None = None,
        abort_after_steps: int = 0,
        cache_salt: str | None = None,
        with_leads: bool = False,
        lora: list[Any] | None = None,
    ) -> dict[str, Any]:
        """Runs all prompts at once. Those that `aborts` numbers are aborted after so many steps.
        `lora` is an adapter's name, number and folder."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        engine = self.llm.llm_engine
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=2 if with_leads else None,
        )
        numbers: dict[str, int] = {}
        for number, tokens in enumerate(prompts):
            prompt: dict[str, Any] = {"prompt_token_ids": tokens}
            if cache_salt is not None:
                prompt["cache_salt"] = cache_salt
            name = f"request-{self.requests}"
            self.requests += 1
            adapter = None if lora is None else LoRARequest(*lora)
            engine.add_request(name, prompt, sampling, lora_request=adapter)
            numbers[name] = number
        tokens_of: list[list[int]] = [[] for _ in prompts]
        reasons: list[str | None] = [None] * len(prompts)
        cached: list[int | None] = [None] * len(prompts)
        leads: list[list[float]] = [[] for _ in prompts]
        steps = ended = 0
        doomed = set(aborts or ())
        while True:
            if doomed and steps >= abort_after_steps:
                engine.abort_request([name for name, number in numbers.items() if number in doomed])
                for number in doomed:
                    reasons[number] = reasons[number] or "abort"
                ended += len(doomed)
                doomed = set()
            if not engine.has_unfinished_requests():
                break
            for output in engine.step():
                number = numbers[output.request_id]
                if output.finished:
                    tokens_of[number] = list(output.outputs[0].token_ids)
                    reasons[number] = output.outputs[0].finish_reason
                    cached[number] = output.num_cached_tokens
                    if with_leads:
                        leads[number] = leads_of(output.outputs[0].logprobs)
                    ended += 1
                    self.reply("progress", ended=ended, number=number)
            steps += 1
        return {
            "tokens": tokens_of,
            "reasons": reasons,
            "cached": cached,
            "steps": steps,
            "leads": leads,
        }

    def reset(self, patience: float = 60.0) -> dict[str, Any]:
        """Blocks of saves under way come free in later steps, so it is tried for a while."""
        deadline = time.monotonic() + patience
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                return {"reset": False}
            if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
                self.llm.llm_engine.step()
            time.sleep(0.02)
        return {"reset": True}

    def metrics(self) -> dict[str, Any]:
        sums: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", None)
            if value is None:
                value = getattr(metric, "count", None)
            if value is not None:
                sums[metric.name] = sums.get(metric.name, 0) + value
        return {"metrics": sums}

    def script(self, path: str, arguments: list[str]) -> dict[str, Any]:
        printed = io.StringIO()
        sys.argv = [path, *arguments]
        with contextlib.redirect_stdout(printed):
            runpy.run_path(path, run_name="__main__")
        return {"printed": printed.getvalue()}

    def close(self) -> dict[str, Any]:
        from vllm.distributed import cleanup_dist_env_and_memory

        llm, self.llm = self.llm, None
        shutdown = getattr(llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        return {}

    def serve(self, commands: TextIO) -> None:
        for line in commands:
            command = json.loads(line)
            try:
                answer = getattr(self, command["command"])(**command["arguments"])
            except Exception as error:
                traceback.print_exc()
                self.reply("failed", error=f"{type(error).__name__}: {error}")
            else:
                self.reply("done", **answer)


def leads_of(logprobs: Any) -> list[float]:
    """How far the best token was ahead of the second best, at each place."""
    leads = []
    for at in logprobs:
        best = sorted((entry.logprob for entry in at.values()), reverse=True)
        leads.append(best[0] - best[1])
    return leads


def serve_on(kind: type[Server], commands: int, replies: int) -> None:
    """Serves until the commands end."""
    with os.fdopen(commands, encoding="utf-8") as lines, os.fdopen(replies, "w") as answers:
        server = kind(answers)
        server.serve(lines)
        if server.llm is not None:
            server.close()


def serve(kind: type[Server]) -> None:
    """Serves standard input, which vLLM does not get to see, on the descriptor of the argument."""
    commands = os.dup(sys.stdin.fileno())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    serve_on(kind, commands, int(sys.argv[1]))


if __name__ == "__main__":
    serve(Server)
