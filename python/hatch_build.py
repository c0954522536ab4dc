"""Puts library and programs into the wheel, and their sources into the source distribution.

PEGAFLOW_WHEEL_NATIVE names a folder that has them, and PEGAFLOW_WHEEL_PLATFORM the platform that
they were built for (`make wheel` sets both). Without it they are built here by cargo, for this
machine. An editable installation has none: set PEGAFLOW_LIBRARY.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "libpegaflow.so.0"
PROGRAMS = ("pegaflowd", "pegactl")
#: In a source distribution the Rust workspace lies below this folder.
SOURCES = "rust"


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling, once for each target."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is that of the target: "standard" or "editable"."""
        root = Path(self.root)
        if self.target_name == "sdist":
            # In an unpacked source distribution they are in place.
            if not (root / SOURCES).is_dir():
                build_data["force_include"].update(sources(root.parent))
        elif version != "editable":
            native = os.environ.get("PEGAFLOW_WHEEL_NATIVE")
            platform = os.environ.get("PEGAFLOW_WHEEL_PLATFORM") or machine()
            folder = Path(native) if native else build(root)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
            for path in folder.iterdir():
                build_data["force_include"][str(path)] = f"pegaflow/_native/{path.name}"


def machine() -> str:
    """The platform tag of binaries that need this machine's C library."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def sources(checkout: Path) -> dict[str, str]:
    """The files of the Rust workspace that git knows, and where they go."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=checkout, check=True, capture_output=True, text=True
    ).stdout
    left_out = ("python/", "fuzz/", ".ci/", ".git")
    return {
        str(checkout / name): f"{SOURCES}/{name}"
        for name in listing.split("\0")
        if name and not name.startswith(left_out)
    }


def build(root: Path) -> Path:
    """Builds library and programs with cargo; returns the folder where they lie."""
    workspace = root / SOURCES
    if not workspace.is_dir():
        workspace = root.parent
    target = Path(os.environ.get("CARGO_TARGET_DIR") or workspace / "target").absolute()
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target), "STRIP": "1"}
    subprocess.run(
        [
            "cargo",
            "build",
            "--release",
            "--locked",
            "--config",
            "profile.release.strip=true",
            *(word for name in PROGRAMS for word in ("--bin", name)),
        ],
        cwd=workspace,
        env=environment,
        check=True,
    )
    native = target / "native"
    subprocess.run(
        [workspace / "client-c" / "build-so.sh"],
        cwd=workspace,
        env={**environment, "DIST": str(target / "native-dist")},
        check=True,
    )
    shutil.rmtree(native, ignore_errors=True)
    native.mkdir()
    for name in PROGRAMS:
        shutil.copy(target / "release" / name, native)
    shutil.copy(target / "native-dist" / "lib" / LIBRARY, native)
    shutil.copy(workspace / "packaging" / "THIRD-PARTY.md", native)
    return native
