#!/usr/bin/env bash
# Builds the fuzz targets with coverage counters and AddressSanitizer and runs them one after the
# other, each for FUZZ_SECONDS of CPU time. What was found is in fuzz/artifacts/<target>/, what was
# learnt stays in the build folder.
#
#   FUZZ_TARGET    one target; default: all
#   FUZZ_SECONDS   CPU seconds for each; default 1800
#   FUZZ_JOBS      processes that share them and what they learn, on a machine with as many CPUs;
#                  default 1
#   FUZZ_BUILD     0 runs what the last call built
set -euo pipefail
cd "$(dirname "$0")"

seconds=${FUZZ_SECONDS:-1800}
jobs=${FUZZ_JOBS:-1}
built=${CARGO_TARGET_DIR:-$PWD/../target}/libfuzzer
read -ra targets <<<"${FUZZ_TARGET:-control catalog descriptors ring index ssd}"

if [[ ${FUZZ_BUILD:-1} == 1 ]]; then
    command -v cargo-fuzz >/dev/null || {
        echo 'make fuzz: install it first: cargo install --locked cargo-fuzz' >&2
        exit 1
    }
    # Coverage counters and sanitizers are unstable options; the compiler is the stable one.
    CARGO_INCREMENTAL=0 RUSTC_BOOTSTRAP=1 cargo-fuzz build --fuzz-dir . --target-dir "$built"
fi

# A fuzzer that is stopped leaves the folder of the input at hand behind, and a script that is
# stopped its fuzzers, which as background jobs hear no Ctrl-C.
pids=()
PEGAFLOW_FUZZ_DIR=$(mktemp -d /dev/shm/pegaflow-fuzz.XXXXXX)
export PEGAFLOW_FUZZ_DIR
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$PEGAFLOW_FUZZ_DIR"' EXIT
trap 'exit 130' INT TERM

failed=0
for target in "${targets[@]}"; do
    learnt=$built/corpus/$target
    mkdir -p "$learnt" "artifacts/$target" "corpus/$target" "regressions/$target"
    # A thread that brings the pool into the page tables may outlive its input, which looks like a
    # leak; `make asan` looks for real ones.
    options=(-artifact_prefix="artifacts/$target/" -timeout=60 -rss_limit_mb=2048
        -max_len=16384 -print_final_stats=1 -detect_leaks=0)
    [[ -e dictionaries/$target ]] && options+=(-dict="dictionaries/$target")
    echo "==> $target for $seconds s of CPU time, $jobs at a time"
    share=$(((seconds + jobs - 1) / jobs))
    rm -f "$built/$target".*.log
    pids=()
    for ((job = 0; job < jobs; job++)); do
        prlimit --cpu="$share:$((share + 60))" "$built/x86_64-unknown-linux-gnu/release/$target" \
            "${options[@]}" "$learnt" "corpus/$target" "regressions/$target" \
            2>"$built/$target.$job.log" &
        pids+=($!)
    done
    for job in "${!pids[@]}"; do
        status=0
        # The time limit ends it with SIGXCPU: status 152 is a run without a finding.
        # The shell's own word about it is left out.
        { wait "${pids[job]}"; } 2>/dev/null || status=$?
        grep -E '^#[0-9]+' "$built/$target.$job.log" | tail -n 1 || true
        if ((status != 152 && status != 0)); then
            echo "$target: status $status; its last lines:"
            tail -n 40 "$built/$target.$job.log"
            failed=1
        fi
    done
done
((failed == 0))
