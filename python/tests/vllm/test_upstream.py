"""vLLM's own unit tests for connectors, with this project's connector where they take any.

`docs/vllm-tests.md` lists each file of them: run, or left out with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.vllm.place import LIBRARY, ROOT, SOURCES

#: The source archive of the vLLM under test, in which its tests are.
ARCHIVE = "PEGAFLOW_VLLM_SOURCE"
UNIT = "tests/v1/kv_connector/unit"
#: What vLLM's tests name; only its shape matters, and it is not downloaded.
MODEL = "facebook/opt-125m"
SHAPE = """{"architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 50272,
"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
"max_position_embeddings": 2048, "word_embed_proj_dim": 768, "torch_dtype": "float16",
"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's `tests` folder, without vLLM beside it, and the model's shape."""
    archive = os.environ.get(ARCHIVE)
    if archive is None:
        pytest.skip(f"no vLLM: {ARCHIVE} is not set (make test-vllm sets it)")
    folder = tmp_path_factory.mktemp("upstream")
    with tarfile.open(archive) as source:
        for member in source:
            _, _, member.name = member.name.partition("/")
            if member.name.startswith("tests/") and member.isfile():
                source.extract(member, folder, filter="data")
    (folder / MODEL).mkdir(parents=True)
    (folder / MODEL / "config.json").write_text(SHAPE, encoding="utf-8")
    return folder


def selection() -> tuple[dict[str, set[str]], dict[str, str]]:
    """From the document: files that run, with the tests left out of each, and files left out."""
    run: dict[str, set[str]] = {}
    left: dict[str, str] = {}
    text = (ROOT / "docs" / "vllm-tests.md").read_text(encoding="utf-8")
    for name, verdict, why in re.findall(r"^\| `([^`]+)` \| (\w[^|]*?) \| (.*?) \|$", text, re.M):
        if "::" in name:
            file, test = name.split("::", 1)
            run.setdefault(file, set()).add(test)
            assert verdict == "left out"
        elif verdict == "run":
            run.setdefault(name, set())
        else:
            left[name] = why
        assert why.strip(), f"{name}: no reason"
    return run, left


def test_every_file_of_vllms_tests_is_run_or_left_out_with_a_reason(tree: Path) -> None:
    run, left = selection()
    there = {str(path.relative_to(tree / UNIT)) for path in (tree / UNIT).rglob("test_*.py")}
    assert set(run) | set(left) == there
    assert not set(run) & set(left)


def test_vllms_own_tests_pass_with_this_connector(python: str, tree: Path) -> None:
    run, _ = selection()
    paths = [f"{UNIT}/{file}" for file in sorted(run)]
    left_out = [
        f"--deselect={UNIT}/{file}::{test}" for file, tests in run.items() for test in tests
    ]
    report = tree / "report.xml"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    } | {
        "PYTHONPATH": os.pathsep.join(
            map(str, (tree, Path(__file__).parent / "upstream", SOURCES))
        ),
        # No daemon of this name: everything misses.
        "PEGAFLOW_NODE": "upstream-tests",
        "PEGAFLOW_SOCKET": str(tree / "none.sock"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    assert LIBRARY in environment
    result = subprocess.run(
        [
            python,
            "-m",
            "pytest",
            "-p",
            "substitute",
            "-q",
            "--tb=short",
            "-c",
            os.devnull,
            "--rootdir",
            ".",
            f"--confcutdir={UNIT}",
            f"--junitxml={report}",
            *left_out,
            *paths,
        ],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "skipped")}
    # A selection that selects nothing would pass, too.
    assert counts["tests"] - counts["skipped"] >= 60, counts
    for deselected in left_out:
        test = deselected.rpartition("::")[2].partition("[")[0]
        file = deselected.partition("=")[2].partition("::")[0]
        assert f"def {test}(" in (tree / file).read_text(encoding="utf-8"), f"no test {test}"
