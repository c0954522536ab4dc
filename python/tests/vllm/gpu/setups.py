"""What is measured side by side: no connector, this project, and its peers."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm.place import SOURCES, connector
from tests.vllm.process import EngineError, Vllm

#: The shape of Qwen3-8B: 36 layers of 8 KV heads of 128 values, 147,456 bytes of KV for each token.
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
#: The same in small, for a rehearsal on a machine without a GPU.
SMALL = SHAPE | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Settings:
    """Where things lie on the machine, and sizes."""

    #: `site/`, `peer/` and `ours/` of the pack: vLLM, public PegaFlow, and this project's wheel.
    pack: Path
    #: For logs, sockets and the model's configuration.
    folder: Path
    python: str
    kv_bytes: int
    pool_bytes: int
    rehearsal: bool = False
    #: Decode steps are CUDA graphs: bound by the GPU, not by the processor that launches kernels.
    graphs: bool = False
    #: Every engine in a process of its own, as under `vllm serve`.
    served: bool = False

    @property
    def shape(self) -> dict[str, Any]:
        """The model's configuration."""
        return SMALL if self.rehearsal else SHAPE

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return 32 if self.rehearsal else 16

    @property
    def bytes_per_token(self) -> int:
        """KV of one token: keys and values of two bytes each."""
        shape = self.shape
        values = shape["num_key_value_heads"] * shape["head_dim"]
        return int(2 * shape["num_hidden_layers"] * values * 2)

    def scaled(self, tokens: int) -> int:
        """A length, or a shorter one for a rehearsal."""
        return max(40, tokens // 20) if self.rehearsal else tokens


class Engine(Vllm):
    """An engine process with a clock, which can be stood still: several are alive on one machine,
    and only one of them is to take its cores and its GPU."""

    MODULE = "tests.vllm.gpu.engine"
    LIMIT_SECONDS = 240.0
    STOP_SECONDS = 10.0
    stands_still = True

    def sleep(self) -> None:
        """Stops the process and all below it."""
        if self.stands_still:
            os.killpg(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Lets them go on."""
        os.killpg(self.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Setup:
    """One way of running vLLM. Stands where the CPU tests have a `Place`."""

    name: str
    settings: Settings
    transfer: dict[str, Any] | None
    #: Before vLLM's own folder on the path; the peer's package has the same name as ours.
    package: Path
    #: vLLM's engine has a process of its own, as under `vllm serve`. Otherwise it runs in the one
    #: that measures, and only the engine is measured.
    multiprocess: bool = False
    #: vLLM's model runner: 1 can lay all layers of a block side by side, 2 (what vLLM takes for
    #: dense models) has one tensor for each layer. None leaves the choice to vLLM.
    runner: int | None = None

    @property
    def folder(self) -> Path:
        return self.settings.folder

    @property
    def python(self) -> str:
        return self.settings.python

    @property
    def engine(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": str(self.folder / "model"),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": 20_000,
            # As `vllm serve` has it: four engines have to fit.
            "max_num_batched_tokens": 8192,
            "block_size": self.settings.block,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            # The KV cache is of a given size; no more than this has to be free at the start.
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": self.settings.kv_bytes,
            "disable_log_stats": False,
            "seed": 0,
        }
        if self.settings.rehearsal:
            arguments["max_model_len"] = arguments["max_num_batched_tokens"] = 1024
            for only_gpu in ("gpu_memory_utilization", "kv_cache_memory_bytes"):
                del arguments[only_gpu]
        if self.settings.graphs:
            arguments["enforce_eager"] = False
            # Captured as they are, without a compiler; steps with a prompt in them stay eager.
            arguments["compilation_config"] = {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32],
            }
        if self.transfer is not None:
            arguments["kv_transfer_config"] = self.transfer
        return arguments

    def environment(self, *, multiprocess: bool) -> dict[str, str]:
        site = self.settings.pack / "site"
        runner = self.runner
        chosen = {} if runner is None else {"VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)}
        return (
            dict(os.environ)
            | chosen
            | {
                "PYTHONPATH": os.pathsep.join(map(str, (self.package, site, SOURCES))),
                "PYTHONHASHSEED": "0",
                "PEGAFLOW_NODE": "measured",
                "PEGAFLOW_SOCKET": str(self.folder / "pegaflow.sock"),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if multiprocess else "0",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                "VLLM_USE_FLASHINFER_SAMPLER": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        )

    def serving(self) -> contextlib.AbstractContextManager[None]:
        """Whatever must run beside vLLM; the late ones of ours find it running."""
        if self.name == "pegaflow":
            return daemon(self.settings)
        if self.name == "public":
            return peer_server(self.settings)
        return contextlib.nullcontext()

    def start(self) -> Engine:
        """The engine, with its model, ready to be measured."""
        served = self.multiprocess or self.settings.served
        engine = Engine(self, self.name, multiprocess=served)
        # The peer's server forgets an engine whose heartbeat it misses. That is all this one does.
        engine.stands_still = self.name != "public"
        try:
            engine.call("open", arguments=self.engine)
            engine.call("randomise")
        except EngineError:
            engine.kill()
            raise
        return engine


def setups(settings: Settings) -> dict[str, Setup]:
    """All of them by name; `none` first."""
    public = connector()
    public["kv_connector_extra_config"] = {}
    offloading = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": settings.pool_bytes},
    }

    def salted(salt: str) -> dict[str, Any]:
        return connector(**{"pegaflow.salt": salt})

    ours, peer = settings.pack / "ours", settings.pack / "peer"
    listed = [
        Setup("none", settings, None, ours),
        Setup("pegaflow", settings, connector(), ours),
        Setup("offloading", settings, offloading, ours),
        Setup("public", settings, public, peer),
        # The same again, with all layers of a block side by side, and with vLLM's own processes.
        # What one of them saves is not there for the others.
        Setup("pegaflow-layers", settings, salted("layers"), ours, runner=1),
        Setup("pegaflow-served", settings, salted("served"), ours, multiprocess=True),
    ]
    folder = settings.folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings.shape, indent=1), encoding="utf-8")
    return {setup.name: setup for setup in listed}


def command_line(description: str) -> argparse.ArgumentParser:
    """Arguments of everything that runs with a pack."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pack", type=Path, required=True, help="folder of the unpacked pack")
    parser.add_argument("--folder", type=Path, help="for logs [a temporary one]")
    parser.add_argument("--rehearse", action="store_true", help="go through it on a CPU")
    return parser


def log_folder(options: argparse.Namespace) -> Path:
    """The folder that the arguments name, or one that is made."""
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="pegaflow-vllm-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the end of the block."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def until(ready: Any, child: subprocess.Popen[bytes], log: Path, seconds: float = 90.0) -> None:
    """Waits until a server serves."""
    deadline = time.monotonic() + seconds
    while not ready():
        if child.poll() is not None or time.monotonic() > deadline:
            end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"{log.name}: the server does not come up:\n{end}")
        time.sleep(0.1)


@contextlib.contextmanager
def daemon(settings: Settings) -> Iterator[None]:
    """This project's daemon, its pool pinned before the first engine comes."""
    log = settings.folder / "pegaflowd.log"
    command = [
        str(settings.pack / "ours" / "pegaflow" / "_native" / "pegaflowd"),
        "--node",
        "measured",
        "--socket",
        str(settings.folder / "pegaflow.sock"),
        "--pool-size",
        str(settings.pool_bytes),
        "--pool",
        "fresh",
        "--pin",
        "start",
        "--http",
        "off",
    ]
    shm = Path(os.environ.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow")) / "measured"
    try:
        with running(command, log, dict(os.environ)) as child:
            until(lambda: " ready " in log.read_text(encoding="utf-8"), child, log)
            yield
    finally:
        # The pool outlives its daemon, and the next setup wants the memory.
        shutil.rmtree(shm, ignore_errors=True)


@contextlib.contextmanager
def peer_server(settings: Settings) -> Iterator[None]:
    """Public PegaFlow's server, which its connector looks for at its default address."""
    log = settings.folder / "pegaflow-server.log"
    environment = dict(os.environ)
    folders = [sysconfig.get_config_var("LIBDIR") or "", environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    environment["PYTHONPATH"] = str(settings.pack / "peer")
    command = [
        str(settings.pack / "peer" / "pegaflow" / "pegaflow-server-py"),
        "--pool-size",
        f"{settings.pool_bytes >> 30}gb",
        "--devices",
        "0",
        "--http-addr",
        "127.0.0.1:9091",
    ]

    def healthy() -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:9091/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    with running(command, log, environment) as child:
        until(healthy, child, log)
        yield
