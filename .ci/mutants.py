#!/usr/bin/env python3
"""Removes the guards of the design's invariants one by one and demands that a named test fails.

    .ci/mutants.py                  all mutants of tests/mutants/*.toml
    .ci/mutants.py --only NAME...   these (names or parts of names)
    .ci/mutants.py --check          no building: texts, tests and docs/verification.md fit the table
    .ci/mutants.py --write-doc      writes the table into docs/verification.md
    .ci/mutants.py --list | --json

Works on a copy of the tree under the target folder (CARGO_TARGET_DIR, or target/), with a target
folder of its own that later runs reuse. Exits 1 if a mutant survives or an entry does not fit.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "tests/mutants"
DOC = ROOT / "docs/verification.md"
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"
FIELDS = {"name", "invariant", "guard", "file", "line", "replacement", "package", "target", "test"}
OPTIONAL = {"loom", "timeout_s"}
# A test that hangs without its guard has noticed, too.
TIMEOUT_S = 180
BUILD_TIMEOUT_S = 1800


class Problem(Exception):
    """An entry that does not fit the tree, or a test that cannot be judged."""


def load():
    tables = [path.read_text(encoding="utf-8") for path in sorted(TABLES.glob("*.toml"))]
    mutants = [mutant for table in tables for mutant in tomllib.loads(table)["mutant"]]
    names = set()
    for mutant in mutants:
        name = mutant.get("name", "?")
        missing, unknown = FIELDS - mutant.keys(), mutant.keys() - FIELDS - OPTIONAL
        if missing or unknown:
            raise Problem(f"{name}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        if name in names:
            raise Problem(f"{name}: given twice")
        if mutant["line"] == mutant["replacement"]:
            raise Problem(f"{name}: changes nothing")
        names.add(name)
    return mutants


def mutate(root, mutant):
    """The file's text with the guard replaced."""
    text = (root / mutant["file"]).read_text(encoding="utf-8")
    found = text.count(mutant["line"])
    if found != 1:
        raise Problem(f"{mutant['name']}: its text occurs {found} times in {mutant['file']}")
    return text.replace(mutant["line"], mutant["replacement"])


def test_name(mutant):
    return mutant["test"].rsplit("::", 1)[-1]


def test_functions():
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard",
                              "*.rs"], cwd=ROOT, check=True, capture_output=True, text=True)
    found = set()
    for name in listing.stdout.split():
        if (ROOT / name).is_file():
            text = (ROOT / name).read_text(encoding="utf-8")
            found.update(re.findall(r"^\s*(?:pub )?(?:async )?fn (\w+)\(", text, re.MULTILINE))
    return found


def doc_table(mutants):
    rows = ["| invariant | guard | in | without it fails |", "| --- | --- | --- | --- |"]
    for mutant in sorted(mutants, key=lambda mutant: mutant["invariant"]):
        rows.append(f"| {mutant['invariant']} | {mutant['guard']} (`{mutant['name']}`) | "
                    f"`{mutant['file']}` | `{test_name(mutant)}` |")
    return "\n".join(rows)


def doc_with_table(mutants):
    text = DOC.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{doc_table(mutants)}\n\n{END}{rest.split(END)[1]}"


def check(mutants):
    problems = []
    functions = test_functions()
    for mutant in mutants:
        try:
            mutate(ROOT, mutant)
        except (Problem, OSError) as problem:
            problems.append(str(problem))
        if test_name(mutant) not in functions:
            problems.append(f"{mutant['name']}: there is no test {mutant['test']}")
    covered = {mutant["invariant"] for mutant in mutants}
    for invariant in range(1, 9):
        if invariant not in covered:
            problems.append(f"invariant {invariant} has no mutant")
    if doc_with_table(mutants) != DOC.read_text(encoding="utf-8"):
        problems.append("docs/verification.md: its table is old: .ci/mutants.py --write-doc")
    for problem in problems:
        print(f"mutants: {problem}")
    print(f"mutants: {len(mutants)} entries, {len(problems)} findings")
    return 1 if problems else 0


class Bench:
    """A copy of the tree in which guards are removed."""

    def __init__(self):
        target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
        self.tree, self.target = target / "mutants/tree", target / "mutants/build"
        self.copy()

    def copy(self):
        """Copies what differs, so that a later run builds only that."""
        listing = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT, check=True, capture_output=True).stdout.decode()
        names = {name for name in listing.split("\0") if name and (ROOT / name).is_file()}
        for name in names:
            source, copy = ROOT / name, self.tree / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.is_file() or copy.read_bytes() != source.read_bytes():
                shutil.copy(source, copy)
        for path in list(self.tree.rglob("*")):
            if path.is_file() and str(path.relative_to(self.tree)) not in names:
                path.unlink()

    def cargo(self, mutant, *arguments, timeout):
        environment = dict(os.environ, CARGO_TARGET_DIR=str(self.target), CARGO_INCREMENTAL="1",
                           CARGO_TERM_COLOR="never", RUST_BACKTRACE="0")
        command = ["cargo", "test", "--quiet", "--package", mutant["package"]]
        command += mutant["target"].split()
        if mutant.get("loom"):
            environment.update(RUSTFLAGS="--cfg loom", CARGO_PROFILE_RELEASE_LTO="off",
                               LOOM_MAX_PREEMPTIONS="2",
                               CARGO_TARGET_DIR=str(self.target) + "-loom")
            command.append("--release")
        process = subprocess.Popen(command + list(arguments), cwd=self.tree, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            return None, output
        return process.returncode, output

    def test(self, mutant):
        """Builds, then runs the one test. True if it passes."""
        status, output = self.cargo(mutant, "--no-run", timeout=BUILD_TIMEOUT_S)
        if status != 0:
            raise Problem(f"{mutant['name']}: does not compile:\n{output[-3000:]}")
        status, output = self.cargo(mutant, "--", "--exact", mutant["test"],
                                    timeout=mutant.get("timeout_s", TIMEOUT_S))
        if status == 0:
            if not re.search(r"\b1 passed", output):
                raise Problem(f"{mutant['name']}: {mutant['test']} is not the name of one test")
            return True, output
        return False, output

    def prove(self, mutant):
        """The test passes with the guard in place."""
        passes, output = self.test(mutant)
        if not passes:
            raise Problem(f"{mutant['name']}: {mutant['test']} fails with the guard in place:\n"
                          f"{output[-3000:]}")

    def remove(self, mutant):
        """The test fails without the guard."""
        path = self.tree / mutant["file"]
        original = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutate(self.tree, mutant), encoding="utf-8")
            survives, _ = self.test(mutant)
        finally:
            path.write_text(original, encoding="utf-8")
        if survives:
            raise Problem(f"{mutant['name']}: SURVIVED: {mutant['test']} passes without the guard "
                          f"({mutant['guard']})")


def run(mutants, as_json):
    bench = Bench()
    results = {mutant["name"]: {"invariant": mutant["invariant"], "test": mutant["test"],
                                "outcome": "caught", "seconds": 0} for mutant in mutants}
    # First everything in place, then one guard after the other: half the building.
    for phase, step in (("in place", bench.prove), ("removed", bench.remove)):
        for number, mutant in enumerate(mutants, 1):
            result, started = results[mutant["name"]], time.monotonic()
            if result["outcome"] == "failed":
                continue
            try:
                step(mutant)
            except Problem as problem:
                result.update(outcome="failed", problem=str(problem))
            result["seconds"] += round(time.monotonic() - started)
            if not as_json:
                said = {"in place": "passes", "removed": "caught"}[phase]
                print(f"[{phase} {number}/{len(mutants)}] {mutant['name']}: "
                      f"{result.get('problem', said)}, {result['seconds']} s", flush=True)
    failed = [name for name, result in results.items() if result["outcome"] == "failed"]
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        print(f"mutants: {len(results) - len(failed)} caught, {len(failed)} not: "
              f"{', '.join(failed) or 'none'}")
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names or parts of names")
    parser.add_argument("--check", action="store_true", help="compare the table with the tree")
    parser.add_argument("--write-doc", action="store_true", help="renew docs/verification.md")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    try:
        mutants = load()
        if arguments.check:
            return check(mutants)
        if arguments.write_doc:
            DOC.write_text(doc_with_table(mutants), encoding="utf-8")
            return 0
        if arguments.only:
            wanted = arguments.only
            mutants = [m for m in mutants if any(part in m["name"] for part in wanted)]
            if not mutants:
                raise Problem(f"no mutant is called {' or '.join(wanted)}")
        if arguments.list:
            print("\n".join(f"{m['invariant']} {m['name']}" for m in mutants))
            return 0
        return run(mutants, arguments.json)
    except Problem as problem:
        print(f"mutants: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
