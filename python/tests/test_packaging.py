"""What is packed is the project's own."""

from __future__ import annotations

import re

import pytest

import pegaflow

from .support import ROOT


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE"])
def test_licence_files_are_copies_of_the_projects(name: str) -> None:
    assert (ROOT / "python" / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_version_is_that_of_the_workspace() -> None:
    manifest = (ROOT / "Cargo.toml").read_text()
    found = re.search(r'\[workspace\.package\]\nversion = "(.*)"', manifest)
    assert found is not None
    assert found[1] == pegaflow.__version__
