"""The commands that the README shows for vLLM, as they stand there."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.daemon import Daemon
from tests.vllm.model import write_tokenizer
from tests.vllm.place import ROOT, SOURCES, Place
from tests.vllm.process import LIMIT_SECONDS, tail

BLOCK = re.compile(r"```sh vllm\n(?P<body>.*?)```\n", re.DOTALL)

#: `vllm` of an environment that finds vLLM in another one, for a model and a machine this small.
PROGRAM = """#!/bin/sh
exec "{python}" -m vllm.entrypoints.cli.main "$@" --port {port} --max-model-len 1024 \\
    --dtype float32 --enforce-eager --block-size 32
"""


def environment_beside(python: str, folder: Path, port: int) -> Path:
    """A fresh environment in which vLLM is found, without installing it again; returns its bin."""
    venv.create(folder, with_pip=True, symlinks=True)
    packages = subprocess.run(
        [python, "-c", "import vllm, pathlib; print(pathlib.Path(vllm.__file__).parents[1])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()[-1]
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "vllm.pth").write_text(packages + "\n", encoding="utf-8")
    # vLLM's command asks for the version of the package `vllm`; for CPUs it has another name.
    metadata = own / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    program = folder / "bin" / "vllm"
    program.write_text(PROGRAM.format(python=folder / "bin" / "python", port=port))
    program.chmod(0o755)
    return folder / "bin"


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=LIMIT_SECONDS) as answer:
        parsed: dict[str, Any] = json.load(answer)
        return parsed


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_the_readmes_commands_serve_and_save(python: str, place: Place) -> None:
    if not list((SOURCES / "dist").glob("pegaflow-*.whl")):
        pytest.skip("no wheel in python/dist: make wheel")
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks
    write_tokenizer(place.model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = environment_beside(python, place.folder / "venv", port)
    environment = place.environment(multiprocess=True) | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(place.model),
    }
    # The wheel brings its own library, and nothing else is on the path.
    for name in ("PYTHONPATH", "PYTHONHASHSEED", "PEGAFLOW_LIBRARY", "PEGAFLOW_BIN_DIR"):
        environment.pop(name, None)
    log = place.folder / "readme.log"
    # Its methods read the daemon that the commands start.
    daemon = Daemon(place)
    daemon.tool = str(programs / "pegactl")
    with daemon, log.open("ab") as file:
        shell = subprocess.Popen(
            ["bash", "-xeuo", "pipefail", "-c", "\n".join(blocks)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + LIMIT_SECONDS
            while not healthy(port):
                assert shell.poll() is None, tail(log)
                assert time.monotonic() < deadline, tail(log)
                time.sleep(0.5)
            body = {
                "model": str(place.model),
                "prompt": list(range(5, 205)),
                "max_tokens": 8,
                "temperature": 0,
            }
            answers = [post(port, "/v1/completions", body)["choices"][0]["text"] for _ in "ab"]
            assert answers[0] == answers[1]
            daemon.wait_for("the prompt's six blocks", lambda: daemon.sealed() >= 200 // 32)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
            try:
                shell.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
