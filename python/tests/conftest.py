"""Fixtures: the library that the checkout built, a daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from pegaflow.client import Client

from .engine_support import Engine, Make
from .support import Daemon, binaries

# Before anything loads the library: what is tested is what was built here.
os.environ.setdefault("PEGAFLOW_LIBRARY", str(binaries() / "libpegaflow.so"))


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A running daemon."""
    with Daemon() as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of the running daemon."""
    with daemon.client() as connected:
        yield connected


@pytest.fixture
def make(daemon: Daemon) -> Iterator[Make]:
    """Makes engines of the running daemon."""
    made: list[Engine] = []

    def one(**arguments: Any) -> Engine:
        made.append(Engine(daemon, **arguments))
        return made[-1]

    yield one
    for engine in made:
        engine.close()
