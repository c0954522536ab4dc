"""Where the tests run: folders, programs, environment, and the engine's usual arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: `python/`, from which both the package under test and these tests are imported.
SOURCES = Path(__file__).resolve().parents[2]
ROOT = SOURCES.parent

#: Where the library and the programs under test lie, and vLLM's Python.
LIBRARY = "PEGAFLOW_LIBRARY"
PROGRAMS = "PEGAFLOW_BIN_DIR"
PYTHON = "PEGAFLOW_VLLM_PYTHON"
#: Settings of this environment that engines are to have, of those that change what they do.
#: PYTHONDONTWRITEBYTECODE is not among them: vLLM's modules take half a minute to compile.
KEPT = (LIBRARY, PROGRAMS, "PEGAFLOW_SHM_DIR")


@dataclass(frozen=True)
class Place:
    """One test's surroundings."""

    folder: Path
    model: Path
    python: str
    #: Where the engine's connector finds its daemon.
    node: str = "none"
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.folder / "pegaflow.sock"

    def environment(self, *, multiprocess: bool) -> dict[str, str]:
        """The environment of an engine: this one, without settings that tests must not inherit."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT or not name.startswith(("PEGAFLOW_", "VLLM_", "PYTEST", "PYTHON"))
        }
        return inherited | {
            "PYTHONPATH": str(SOURCES),
            # Without it each process would give the same block another hash.
            "PYTHONHASHSEED": "0",
            "PEGAFLOW_NODE": self.node,
            "PEGAFLOW_SOCKET": str(self.socket),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if multiprocess else "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # One thread: a second one on a shared machine waits for the first, spinning.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def connector(name: str = "PegaKVConnector", **extra: Any) -> dict[str, Any]:
    """The `kv_transfer_config` that names the connector under test."""
    return {
        "kv_connector": name,
        "kv_connector_module_path": "pegaflow.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
