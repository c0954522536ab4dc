"""Fixtures: the library that the checkout built, a daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pegaflow.client import Client

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
