#!/usr/bin/env python3
"""Runs what the README shows, so that the README stays true.

Every fenced block tagged `sh` runs with `bash -euo pipefail` in the repository's root; a block tagged
`c NAME` is first written to NAME in a scratch folder, which the shell blocks see as $README_DIR.
A block after the comment `<!-- not run: why -->` is skipped, and the reason printed. A daemon that
a block starts is stopped at the end: blocks share one private node and socket.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"(?P<skip><!-- not run: (?P<why>[^>]*) -->\n)?```(?P<tag>sh|c (?P<name>\S+))\n(?P<body>.*?)```\n",
    re.DOTALL,
)
LIMIT_SECONDS = 900


def environment(folder):
    """Names that belong to this run alone, so that a daemon of the machine is left in peace."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return {
        **os.environ,
        "README_DIR": str(folder),
        "CARGO_TARGET_DIR": str(target),
        "PEGAFLOW_NODE": f"readme-{os.getpid()}",
        "PEGAFLOW_SOCKET": str(folder / "pegaflow.sock"),
        "PREFIX": str(folder / "prefix"),
        "PATH": f"{folder / 'prefix' / 'bin'}:{os.environ['PATH']}",
        "PKG_CONFIG_PATH": str(folder / "prefix" / "lib" / "pkgconfig"),
        "LD_LIBRARY_PATH": str(folder / "prefix" / "lib"),
    }


def stop_daemon(env):
    """Ends the daemon of this run's node, which its node file names, and removes its files."""
    folder = Path(env.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow")) / env["PEGAFLOW_NODE"]
    pid = None
    for process in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PEGAFLOW_NODE={env['PEGAFLOW_NODE']}".encode() not in process.read_bytes():
                continue
            command = (process.parent / "comm").read_text().strip()
        except OSError:
            continue
        if command == "pegaflowd":
            pid = int(process.parent.name)
            os.kill(pid, signal.SIGTERM)
    if pid is not None:
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            signal.sigtimedwait([], 0.1)
    if folder.is_dir():
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        folder.rmdir()


def run_block(body, env):
    print("\n".join(f"$ {line}" for line in body.strip().splitlines()), flush=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", body], cwd=ROOT, env=env,
        stdin=subprocess.DEVNULL, timeout=LIMIT_SECONDS, check=False,
    )
    return done.returncode


def main():
    blocks = list(FENCE.finditer((ROOT / "README.md").read_text(encoding="utf-8")))
    failed, ran = 0, 0
    with tempfile.TemporaryDirectory(prefix="pegaflow-readme-") as name:
        folder = Path(name)
        env = environment(folder)
        try:
            for block in blocks:
                if block["name"]:
                    (folder / block["name"]).write_text(block["body"], encoding="utf-8")
                elif block["skip"]:
                    print(f"not run ({block['why']}): {block['body'].splitlines()[0]}")
                else:
                    ran += 1
                    status = run_block(block["body"], env)
                    if status:
                        failed += 1
                        print(f"README block failed with status {status}", file=sys.stderr)
        finally:
            stop_daemon(env)
    print(f"README: {ran} blocks run, {failed} failed")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
