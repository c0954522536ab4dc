#!/usr/bin/env python3
"""Checks the rules of style that neither rustfmt nor clippy knows.

Prints one line per finding, `path:line: what`, and exits 1 if there is any. The rules are in
CONTRIBUTING.md.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 800
MAX_WIDTH = 100

# Where `unsafe` may occur: files, and folders (with a slash). Every other Rust file, or a module that
# contains it, says `#![forbid(unsafe_code)]`.
UNSAFE_ALLOWED = (
    "client-c/src/cuda/",
    "client-c/src/ffi/",
    "client-c/src/memory/",
    "client-c/src/shared/process.rs",
    "client-c/tests/",
    "engine/src/copy/",
    "engine/src/device/cuda/",
    "engine/src/device/driver.rs",
    "engine/src/device/pin.rs",
    "engine/src/device/slot.rs",
    "engine/src/device/side.rs",
    "engine/src/device/tests/fake.rs",
    "engine/src/device/tests/rig.rs",
    "engine/src/isolation/peer_groups.rs",
    "engine/src/pool/mapping.rs",
    "engine/src/pool/memory.rs",
    "engine/ssd/src/io/",
    "engine/src/tier/memory.rs",
    "engine/ssd/src/memory.rs",
    "engine/ssd/src/mover/",
    "engine/ssd/tests/",
    "shm-protocol/src/index/raw.rs",
    "shm-protocol/src/mapping/",
    "shm-protocol/src/node/view.rs",
    "shm-protocol/src/ring/raw.rs",
    "shm-protocol/tests/",
    "tests/emulated-cuda/src/api/",
    "tests/emulated-cuda/src/mapping.rs",
    "tests/emulated-cuda/tests/",
    "tests/src/dying.rs",
    "tests/src/gpu/rank.rs",
    "tests/src/memory.rs",
    "tests/src/withheld.rs",
    "tools/src/bench/c_scheduler.rs",
    "tools/src/bench/memcpy.rs",
    "tools/src/bench/gpu/cache.rs",
    "tools/src/doctor/probe.rs",
    "tools/src/gpu/",
    "tools/src/replay/kv.rs",
)

FORBIDDEN_WORDS = (
    (re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"), "unfinished-work marker"),
    (re.compile(r"\b(dbg|todo|unimplemented)!\s*\("), "leftover macro"),
    (re.compile(r"#\[ignore\b"), "ignored test"),
    (re.compile(r"Result<[^;{}]*,\s*(std::string::)?String>"), "error type String"),
    (re.compile(r"(?<![\w.])/(work|root|home)/"), "path of one machine"),
)
# Documents in which every test that is named must exist, and how other long words in them begin.
DOCS_THAT_NAME_TESTS = ("docs/failure-model.md", "docs/verification.md")
NO_TESTS = ("pegaflow_", "pega_")
TEXT_SUFFIXES = {".rs", ".md", ".toml", ".sh", ".py", ".c", ".h", ".cc", ".cpp", ".service", ""}
# Documents that are copied or generated as they are.
EXEMPT = {"LICENSE", "Cargo.lock", "fuzz/Cargo.lock", "packaging/THIRD-PARTY.md", ".ci/style.py"}
# Inputs of the fuzz targets: bytes, whatever they look like.
EXEMPT_FOLDERS = ("fuzz/corpus/", "fuzz/regressions/")


def tracked_files():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout.decode()
    names = [name for name in listing.split("\0")
             if name and name not in EXEMPT and not name.startswith(EXEMPT_FOLDERS)]
    return [name for name in names
            if Path(name).suffix in TEXT_SUFFIXES and (ROOT / name).is_file()]


def strip_rust_noise(line):
    """The line without string literals and comments, enough to find keywords."""
    line = re.sub(r'b?"(\\.|[^"\\])*"', '""', line)
    return line.split("//")[0]


def uses_unsafe(line):
    code = strip_rust_noise(line)
    return re.search(r"\bunsafe\b", code) and "unsafe_" not in code


def has_unsafe_below(name):
    """True for the root of a module tree of which some file uses `unsafe`: `forbid` reaches down."""
    path = ROOT / name
    folder = path.parent if path.name in ("lib.rs", "main.rs", "mod.rs") else path.with_suffix("")
    return folder.is_dir() and any(
        uses_unsafe(line)
        for other in folder.rglob("*.rs") if other != path
        for line in other.read_text(encoding="utf-8").splitlines()
    )


def forbids_unsafe(path):
    return path.is_file() and "#![forbid(unsafe_code)]" in path.read_text(encoding="utf-8")


def forbidden_above(name):
    """True if the file or a module that contains it says `#![forbid(unsafe_code)]`."""
    path = ROOT / name
    if forbids_unsafe(path):
        return True
    folder = path.parent
    while folder != ROOT:
        roots = (folder / "mod.rs", folder / "lib.rs", folder / "main.rs", folder.with_suffix(".rs"))
        if any(forbids_unsafe(root) for root in roots if root != path):
            return True
        folder = folder.parent
    return False


def check_unsafe(name, lines):
    """Each `unsafe` block, impl and extern block has a SAFETY comment in reach above it."""
    allowed = name.startswith(UNSAFE_ALLOWED)
    for number, line in enumerate(lines, 1):
        code = strip_rust_noise(line)
        if not uses_unsafe(line):
            continue
        if not allowed:
            yield number, "unsafe outside the modules that may use it"
        if re.search(r"unsafe\s+(fn|extern)\b", code) or "unsafe(no_mangle)" in code:
            continue
        above = lines[max(0, number - 12):number]
        if not any("SAFETY:" in candidate or "# Safety" in candidate for candidate in above):
            yield number, "unsafe without a SAFETY comment"
    if not allowed and not forbidden_above(name) and not has_unsafe_below(name):
        yield 1, "does not say #![forbid(unsafe_code)]"


def check_file(name):
    try:
        text = (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    lines = text.splitlines()
    if len(lines) > MAX_FILE_LINES and Path(name).suffix != ".md":
        yield len(lines), f"{len(lines)} lines, at most {MAX_FILE_LINES}: split by concept"
    if text and not text.endswith("\n"):
        yield len(lines), "no newline at the end of the file"
    for number, line in enumerate(lines, 1):
        if line != line.rstrip():
            yield number, "space at the end of the line"
        for pattern, what in FORBIDDEN_WORDS:
            if pattern.search(line):
                yield number, what
        table_or_link = Path(name).suffix == ".md" and (line.startswith("|") or "://" in line)
        literal = Path(name).suffix in (".rs", ".toml") and ('"' in line or "://" in line)
        if len(line) > MAX_WIDTH and not table_or_link and not literal:
            yield number, f"{len(line)} columns, at most {MAX_WIDTH}"
    if name.endswith(".rs"):
        yield from check_unsafe(name, lines)


def check_named_tests(name, functions):
    """Each test that a document names exists: words in backquotes with three underscores or more."""
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
        for word in re.findall(r"`(?:\w+::)*([a-z0-9]+(?:_[a-z0-9]+){3,})`", line):
            if word not in functions and not word.startswith(NO_TESTS):
                yield number, f"there is no test {word}"


def main():
    findings = 0
    names = tracked_files()
    functions = {
        function for name in names if name.endswith(".rs")
        for function in re.findall(r"\bfn (\w+)\s*\(", (ROOT / name).read_text(encoding="utf-8"))
    }
    for name in DOCS_THAT_NAME_TESTS:
        for number, what in check_named_tests(name, functions):
            print(f"{name}:{number}: {what}")
            findings += 1
    for name in names:
        for number, what in check_file(name):
            print(f"{name}:{number}: {what}")
            findings += 1
    print(f"style: {len(names)} files, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
