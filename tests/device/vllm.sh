#!/usr/bin/env bash
# Measures vLLM 0.26.0 with and without connectors on a machine with a GPU that cannot download,
# from the parts that vllm-pack.sh made. Parts may come one at a time, as they fit into a transfer:
#
#   tests/device/vllm.sh keep DIR           puts the part in DIR aside
#   tests/device/vllm.sh run DIR [ARGS]     adds the last part, unpacks all, and measures
#   tests/device/vllm.sh check DIR [ARGS]   the same, and compares answers in many shapes
#
# ARGS go to `python3 -m tests.vllm.gpu.measure`, such as --seconds 420 or --setups pegaflow, or to
# `python3 -m tests.vllm.gpu.variants`, such as --only fp8 latent. Results are lines of JSON, and a
# table or a summary at the end. The machine needs Python 3.12 with torch 2.11
# (CUDA 13.0), transformers 5.17 and triton 3.6, and a C compiler for triton.
#
#   PEGAFLOW_STORE   where parts are kept and unpacked, 500 MB [/var/tmp/pegaflow-vllm]
#   OUT              if set, results and logs are also put there
set -euo pipefail
cd "$(dirname "$0")/../.."
store=${PEGAFLOW_STORE:-/var/tmp/pegaflow-vllm}
parts=2

keep() {
    mkdir -p "$store/parts"
    cp "$1/part" "$store/parts/$(basename "$1")"
    cp "$1/sum" "$store/parts/sum"
    [[ ! -e $1/pegaflow.whl ]] || cp "$1/pegaflow.whl" "$store/pegaflow.whl"
}

unpack() {
    for ((part = 1; part <= parts; part++)); do
        [[ -e $store/parts/$part ]] || { echo "vllm.sh: part $part was not kept" >&2; exit 1; }
    done
    cat "$store"/parts/[0-9]* | (cd "$store/parts" && sha256sum --check --status sum) ||
        { echo "vllm.sh: the parts are not whole, or not of one pack" >&2; exit 1; }
    rm -rf "$store/pack"
    mkdir "$store/pack"
    cat "$store"/parts/[0-9]* | python3 -c '
import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as archive:
    archive.extractall(sys.argv[1], filter="data")
' "$store/pack"
    python3 -m zipfile -e "$store/pegaflow.whl" "$store/pack/ours"
    # Once, before all engines do it for themselves at the same time.
    python3 -m compileall -q -j 0 "$store/pack/site" "$store/pack/ours" ||
        echo "vllm.sh: not all modules were compiled ahead" >&2
    chmod 755 "$store"/pack/ours/pegaflow/_native/pega{flowd,ctl}
}

case ${1:-} in
keep)
    keep "${2:?the folder of a part}"
    ;;
run | check)
    keep "${2:?the folder of the last part}"
    case $1 in
    run) module=tests.vllm.gpu.measure ;;
    check) module=tests.vllm.gpu.variants ;;
    esac
    shift 2
    unpack
    logs=$store/logs
    rm -rf "$logs"
    mkdir -p "$logs"
    status=0
    # What is there stays even if the time for all of it runs out.
    PYTHONPATH=python PYTHONUNBUFFERED=1 python3 -m "$module" --pack "$store/pack" \
        --folder "$logs" "$@" 2>&1 | tee "${OUT:-$logs}/vllm-results.txt" || status=$?
    if [[ ${OUT:-} ]]; then
        tar -C "$logs" -czf "$OUT/vllm-logs.tar.gz" --exclude=model --exclude='*.sock*' .
    fi
    exit "$status"
    ;;
*)
    sed -n '2,19s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
