#!/usr/bin/env bash
# Correctness and speed on a machine with NVIDIA GPUs, each figure beside the limit of the same run,
# and one summary. Downloads nothing. The exit status tells whether anything failed.
#
#   PEGAFLOW_BIN_DIR   folder with pegaflowd, pegactl, gpu-soak and gpu-engine built elsewhere;
#                      without it they are built here, which needs cargo and its registry
#   DEVICE_RUN         short (four to six minutes) or full (default; ten to fifteen minutes)
#   DEVICE_GPUS        numbers of GPUs, by default as many as there are up to four
#   DEVICE_SOAK        seconds of random work with deaths (default: 60, full 300): on all of these
#                      GPUs; a sixth as long each, daemons die on the first, and saves have a
#                      limit there; in a full run a third as long on the first alone, too
#   DEVICE_STEPS       of doctor, bench, curve, several, soak (default: all)
#   DEVICE_OUT         folder for logs and JSON (default: a new one, which is named)
set -euo pipefail
cd "$(dirname "$0")/../.."
exec </dev/null

mode=${DEVICE_RUN:-full}
case $mode in
short)
    soak=60 memory=1GiB rounds=6 part_ms=200 curve_memory=512MiB step_limit=200
    several=(2-MiB 16-KiB)
    ;;
full)
    soak=300 memory=2GiB rounds=12 part_ms=400 curve_memory=1GiB step_limit=600
    several=(2-MiB segments)
    ;;
*)
    echo "DEVICE_RUN=$mode: short or full" >&2
    exit 2
    ;;
esac
soak=${DEVICE_SOAK:-$soak}
steps=${DEVICE_STEPS:-doctor bench curve several soak}
out=${DEVICE_OUT:-$(mktemp -d "${TMPDIR:-/tmp}/pegaflow-device.XXXXXX")}
mkdir -p "$out"

command -v nvidia-smi >/dev/null || {
    echo 'no nvidia-smi: this is for machines with NVIDIA GPUs' >&2
    exit 2
}
gpus_here=$(nvidia-smi -L | grep -c '^GPU ')
((gpus_here > 4)) && gpus_here=4
gpus=${DEVICE_GPUS:-$(seq -s, 0 $((gpus_here - 1)))}
first=${gpus%%,*}

if [[ -z ${PEGAFLOW_BIN_DIR:-} ]]; then
    command -v cargo >/dev/null || {
        echo 'no cargo here: name a folder of programs built elsewhere, PEGAFLOW_BIN_DIR' >&2
        exit 2
    }
    cargo build --release -p pegaflow-engine -p pegaflow-tools -p pegaflow-tests --bins
    PEGAFLOW_BIN_DIR=${CARGO_TARGET_DIR:-target}/release
fi
PEGAFLOW_BIN_DIR=$(cd "$PEGAFLOW_BIN_DIR" && pwd)
export PEGAFLOW_BIN_DIR
for program in pegaflowd pegactl gpu-soak gpu-engine; do
    [[ -x $PEGAFLOW_BIN_DIR/$program ]] || {
        echo "$PEGAFLOW_BIN_DIR/$program is missing" >&2
        exit 2
    }
done

# cuBLAS, for the engine that computes: of a CUDA toolkit, or of a Python environment.
find_cublas() {
    local folder folders known
    known=$(ldconfig -p 2>/dev/null | grep -E 'libcublas\.so' || true)
    grep -qE 'libcublas\.so ' <<<"$known" && return 0
    folders=$(
        sed -n 's|.*=> \(.*\)/libcublas.*|\1|p' <<<"$known"
        ls -d /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib 2>/dev/null || true
        python3 -c 'import glob, sysconfig
for name in glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib"): print(name)' \
            2>/dev/null || true
    )
    for folder in $folders; do
        compgen -G "$folder/libcublas.so*" >/dev/null || continue
        # It is looked for by the name without a version, which Python's packages leave out.
        mkdir -p "$out/lib"
        ln -sf "$(compgen -G "$folder/libcublas.so*" | head -n 1)" "$out/lib/libcublas.so"
        export LD_LIBRARY_PATH="$out/lib:$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        return 0
    done
    return 1
}

wants() { [[ " $steps " == *" $1 "* ]]; }

# run NAME COMMAND...: its output to a file, its end within a bound; a failure is remembered.
run() {
    local name=$1 status=0 started=$SECONDS
    shift
    echo "==> $name: $*"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.out" 2>"$out/$name.err" || status=$?
    echo "$status" >"$out/$name.status"
    echo "    status $status after $((SECONDS - started)) s"
    if ((status != 0)); then
        tail -n 30 "$out/$name.err" "$out/$name.out" | cut -c 1-300 | sed 's/^/    | /'
    fi
}

nvidia-smi --query-gpu=index,name,driver_version,pcie.link.gen.max,memory.total --format=csv |
    tee "$out/gpus.csv"
echo "out: $out; $(nproc) cores; GPUs $gpus"
beside=(--interference)
if ! find_cublas; then
    echo 'no cuBLAS here: what copies cost an engine that computes is not measured'
    beside=()
    steps=${steps/curve/}
fi
pegactl=$PEGAFLOW_BIN_DIR/pegactl
bench=("$pegactl" --json bench gpu --rounds "$rounds" --part-ms "$part_ms"
    --daemon-arg=--pin=start)
limit=$step_limit

if wants doctor; then
    run doctor "$pegactl" doctor
fi
if wants bench; then
    run bench "${bench[@]}" --gpus "$first" --memory "$memory" "${beside[@]}"
fi
if wants curve; then
    run curve "${bench[@]}" --gpus "$first" --memory "$curve_memory" --pool-size 256MiB \
        --only nothing --curve
fi
if wants several && [[ $gpus == *,* ]]; then
    # Each alone, each two of them and all at once, against large copies of the same ones at once.
    run several "${bench[@]}" --gpus "$gpus" --pairs --memory "$memory" "${several[@]/#/--only=}"
fi
# soak NAME SECONDS GPUS FURTHER...: random work, all bytes compared.
soak() {
    local name=$1 seconds=$2 gpus=$3
    shift 3
    limit=$((seconds + 90))
    run "$name" env GPU_SOAK_SECONDS="$seconds" GPU_SOAK_GPUS="$gpus" "$@" \
        "$PEGAFLOW_BIN_DIR/gpu-soak"
}
seconds=${soak%.*}
if wants soak; then
    soak "soak-$gpus" "$seconds" "$gpus" GPU_SOAK_BREAK_CONTEXTS=1
    soak "soak-daemon-$first" "$((seconds / 6 + 5))" "$first" GPU_SOAK_KILL_DAEMON=1
    soak "soak-limit-$first" "$((seconds / 6 + 5))" "$first" GPU_SOAK_D2H_LIMIT=500MB
    if [[ $mode == full && $gpus != "$first" ]]; then
        soak "soak-$first" "$((seconds / 3))" "$first" GPU_SOAK_BREAK_CONTEXTS=1
    fi
fi

python3 tests/device/summary.py "$out"
