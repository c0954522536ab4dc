#!/usr/bin/env python3
"""Runs what the README shows, so that the README stays true.

The fenced blocks tagged `sh` run as one script, `bash -euo pipefail`, from the repository's root.
A block tagged `c NAME` or `py NAME` is saved as NAME in a scratch folder, where the script goes on
from there. The script has a home folder, a node name and a socket of its own, so that neither the
user's files nor the machine's daemon are touched. `--done COMMAND` leaves out blocks of just that
command, which the caller has run already. A block tagged `sh vllm` needs vLLM: the tests with a
real vLLM run it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"```(?P<tag>sh|(?:c|py) (?P<name>\S+))\n(?P<body>.*?)```\n", re.DOTALL)
LIMIT_SECONDS = 600


def environment(folder):
    home = Path(os.environ.get("HOME", "/"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PEGAFLOW_")}
    return {
        **kept,
        "HOME": str(folder),
        "CARGO_HOME": os.environ.get("CARGO_HOME", str(home / ".cargo")),
        "RUSTUP_HOME": os.environ.get("RUSTUP_HOME", str(home / ".rustup")),
        "CARGO_TARGET_DIR": os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target")),
        "PEGAFLOW_NODE": f"readme-{os.getpid()}",
        "PEGAFLOW_SOCKET": str(folder / "pegaflow.sock"),
    }


def script(folder, done):
    """The README's blocks as one shell script, and how many of them there are."""
    lines = ["set -x"]
    blocks = 0
    # Whatever happens, the daemon that a block started in the background ends with the script.
    lines.insert(0, "trap 'jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true' EXIT")
    for block in FENCE.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
        if block["name"]:
            (folder / block["name"]).write_text(block["body"], encoding="utf-8")
            lines.append(f"cd '{folder}'")
        elif block["body"].strip() not in done:
            lines.append(block["body"])
            blocks += 1
    return "\n".join(lines), blocks


def main():
    parser = argparse.ArgumentParser(description="run the README's commands")
    parser.add_argument("--done", action="append", default=[], help="a command that has been run")
    done = parser.parse_args().done
    with tempfile.TemporaryDirectory(prefix="pegaflow-readme-") as name:
        folder = Path(name)
        env = environment(folder)
        text, blocks = script(folder, done)
        status = subprocess.run(
            ["bash", "-meuo", "pipefail", "-c", text], cwd=ROOT, env=env,
            stdin=subprocess.DEVNULL, timeout=LIMIT_SECONDS, check=False,
        ).returncode
        shm = Path(env.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow")) / env["PEGAFLOW_NODE"]
        shutil.rmtree(shm, ignore_errors=True)
    print(f"README: {blocks} blocks, status {status}")
    return 1 if status or not blocks else 0


if __name__ == "__main__":
    sys.exit(main())
