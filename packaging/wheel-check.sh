#!/usr/bin/env bash
# Installs the wheel that `make wheel` built into a fresh virtual environment, outside the source
# tree, and uses it (wheel-check.py). Then packs library and programs once more: the same commit
# must give the same bytes, for wheel and source distribution.
#
#   wheel-check.sh          as above
#   wheel-check.sh --full   compiles all of it a second time in a clone in another folder
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d "${TMPDIR:-/tmp}/pegaflow-wheel.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
wheel=$(ls python/dist/*.whl)

"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check --no-index "$wheel"
cp packaging/wheel-check.py "$scratch/"
(cd "$scratch" && env -u PYTHONPATH -u PEGAFLOW_LIBRARY venv/bin/python wheel-check.py)

if [[ ${1:-} == --full ]]; then
    git clone --quiet --no-hardlinks . "$scratch/clone"
    (cd "$scratch/clone" && CARGO_TARGET_DIR=$scratch/target OUT=$scratch/again packaging/wheel.sh)
else
    OUT=$scratch/again packaging/wheel.sh --pack
fi
for file in python/dist/*; do
    cmp "$file" "$scratch/again/$(basename "$file")"
    echo "$(basename "$file"): the same bytes"
done
