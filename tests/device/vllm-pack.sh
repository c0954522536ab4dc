#!/usr/bin/env bash
# Packs vLLM 0.26.0, slimmed, public PegaFlow and this project's wheel for a machine with GPUs
# that cannot download: `vllm.sh` beside this takes it from there. Run it on a machine that can.
#
# vLLM 0.26.0 is the newest release whose wheel is made for torch 2.11 and CUDA 13.0. Of its 700 MB
# only what a dense model with FlashAttention 3 runs is taken. What comes out is one archive, cut
# into parts that can travel one by one:
#
#   PACK/1/part, PACK/2/part   about 42 MiB each
#   PACK/2/pegaflow.whl        this project's wheel, apart, so that it is quickly renewed
#
# Usage: tests/device/vllm-pack.sh [--wheel]    --wheel packs only that anew
#   PACK       where to [target/device/vllm]
#   WHEEL      this project's wheel [python/dist/pegaflow-*.whl: make wheel]
#   PYTHON     a Python with pip [python3]
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}
out=${PACK:-$target/device/vllm}
python=${PYTHON:-python3}
cache=$target/device/wheels
parts=2

wheel=${WHEEL:-$(echo python/dist/pegaflow-*.whl)}
[[ -e $wheel ]] || { echo "vllm-pack.sh: no wheel $wheel: make wheel" >&2; exit 1; }

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
reproducible=(--sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner)

pack_wheel() {
    mkdir -p "$out/$parts"
    install -m 644 "$wheel" "$out/$parts/pegaflow.whl"
}

if [[ ${1:-} == --wheel ]]; then
    pack_wheel
    exit
fi

platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for floor in 5 12 17 24 26 27 28 31 34 35; do
    platforms+=(--platform "manylinux_2_${floor}_x86_64")
done
# download ARGUMENTS...: wheels for Python 3.12, three attempts.
download() {
    local attempt
    for attempt in 1 2 3; do
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary=:all: --python-version 3.12 --implementation cp \
            --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$cache" "$@" && return 0
        echo "vllm-pack.sh: attempt $attempt failed" >&2
        sleep $((attempt * 5))
    done
    return 1
}

echo '==> Wheels'
mkdir -p "$cache"
download vllm==0.26.0
download pegaflow-llm-cu13==0.25.1
download --requirement tests/device/vllm-needs.txt

echo '==> Slimming'
mkdir "$stage/vllm"
"$python" - "$cache" "$stage/vllm" tests/device/vllm-needs.txt <<'PYTHON'
"""Unpacks the wheels: site/ for vLLM and its needs, peer/ for public PegaFlow."""
import re
import sys
import zipfile
from pathlib import Path

cache, stage, needs = map(Path, sys.argv[1:])
KERNELS = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")


def wanted(name):
    """Of vLLM: its Python, two of its libraries, and what importlib.metadata reads."""
    return name.endswith(".py") or name in KERNELS or ".dist-info/" in name


def wheel(requirement):
    name, version = requirement.split("==")
    pattern = re.sub(r"[-_.]+", "_", name) + f"-{version}-*.whl"
    found = sorted(cache.glob(pattern))
    if not found:
        sys.exit(f"no wheel {pattern} in {cache}")
    return found[-1]


def unpack(requirement, folder, filtered=lambda name: True):
    with zipfile.ZipFile(wheel(requirement)) as archive:
        for name in filter(filtered, archive.namelist()):
            archive.extract(name, stage / folder)


unpack("vllm==0.26.0", "site", wanted)
unpack("pegaflow-llm-cu13==0.25.1", "peer")
for line in needs.read_text().splitlines():
    if line and not line.startswith("#"):
        unpack(line, "site")
for program in (stage / "peer" / "pegaflow").glob("pegaflow-*-py"):
    program.chmod(0o755)
PYTHON
# The peer's second server is not used, and symbols are dead weight.
rm "$stage/vllm/peer/pegaflow/pegaflow-metaserver-py"

echo '==> Packing (minutes)'
rm -rf "$out"
mkdir -p "$out"
tar "${reproducible[@]}" -C "$stage/vllm" -c . |
    xz -9 -T "${THREADS:-2}" --block-size=256MiB >"$out/archive"
split --number="$parts" --numeric-suffixes=1 --suffix-length=1 "$out/archive" "$out/part."
for ((part = 1; part <= parts; part++)); do
    mkdir "$out/$part"
    mv "$out/part.$part" "$out/$part/part"
done
(cd "$out" && sha256sum archive | sed 's/archive/-/' | tee 1/sum >2/sum)
rm "$out/archive"
pack_wheel
du -b "$out"/*/*
