"""The console scripts become the programs that the wheel carries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pegaflow import _scripts

from .support import ROOT

RUN = (
    "import sys; from pathlib import Path; from pegaflow import _scripts\n"
    "_scripts.NATIVE = Path(sys.argv.pop(1)); _scripts.pegactl()"
)


def run(native: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, native, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "python",
    )


def test_arguments_and_exit_status_are_the_programs(tmp_path: Path) -> None:
    program = tmp_path / "pegactl"
    program.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    program.chmod(0o755)
    ran = run(tmp_path, "status", "--node", "a b")
    assert (ran.returncode, ran.stdout) == (7, "status --node a b\n")


@pytest.mark.parametrize("there", [False, True])
def test_a_program_that_cannot_run_is_named_with_the_way_out(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "pegactl").write_text("not executable")
    ran = run(tmp_path, "status")
    assert ran.returncode == 1
    assert str(tmp_path / "pegactl") in ran.stderr
    assert "cargo build --release --bin pegactl" in ran.stderr


def test_the_library_lies_beside_the_programs() -> None:
    from pegaflow.client._library import BUNDLED

    # So the library finds the daemon for autostart.
    assert BUNDLED.parent == _scripts.NATIVE
