"""The console scripts `pegaflowd` and `pegactl`: they become the programs of the wheel."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

#: Where a wheel carries the programs, beside the library.
NATIVE = Path(__file__).resolve().parent / "_native"


def pegaflowd() -> NoReturn:
    """The node daemon."""
    become("pegaflowd")


def pegactl() -> NoReturn:
    """Status, diagnosis and benchmarks."""
    become("pegactl")


def become(name: str) -> NoReturn:
    """Replaces this process, so that signals and the exit status are the program's own."""
    program = NATIVE / name
    try:
        os.execv(program, [name, *sys.argv[1:]])
    except OSError as error:
        sys.exit(
            f"{name}: cannot run {program}: {error.strerror}. Install the package from a wheel, or"
            f" build the program: cargo build --release --bin {name}"
        )
