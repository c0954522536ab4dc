#!/usr/bin/env bash
# Runs the tests with a real vLLM, in the environment that setup.sh makes or finds.
#
# Usage: python/tests/vllm/run.sh [PYTEST ARGUMENTS]
#   PEGAFLOW_BIN_DIR   has pegaflowd, pegactl and libpegaflow.so [target/debug]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
PEGAFLOW_VLLM_PYTHON=$("$here/setup.sh")
export PEGAFLOW_VLLM_PYTHON
venv=$(dirname "$(dirname "$PEGAFLOW_VLLM_PYTHON")")
export PEGAFLOW_BIN_DIR=${PEGAFLOW_BIN_DIR:-${CARGO_TARGET_DIR:-$root/target}/debug}
export PEGAFLOW_LIBRARY=${PEGAFLOW_LIBRARY:-$PEGAFLOW_BIN_DIR/libpegaflow.so}
export PEGAFLOW_VLLM_SOURCE=$venv/source/vllm-0.32.0.tar.gz
cd "$root/python"
exec "$PEGAFLOW_VLLM_PYTHON" -m pytest -c tests/vllm/pytest.ini --rootdir . "${@:-tests/vllm}"
