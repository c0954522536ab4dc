#!/usr/bin/env bash
# Builds the fuzz targets with coverage counters and AddressSanitizer and runs them one after the
# other, each for FUZZ_SECONDS of CPU time. What was found is in fuzz/artifacts/<target>/, what was
# learnt stays in the build folder.
#
#   FUZZ_TARGET    one target; default: all
#   FUZZ_SECONDS   CPU seconds for each; default 1800
#   FUZZ_BUILD     0 runs what the last call built
set -euo pipefail
cd "$(dirname "$0")"

seconds=${FUZZ_SECONDS:-1800}
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

# A fuzzer that is stopped leaves the folder of the input at hand behind.
PEGAFLOW_FUZZ_DIR=$(mktemp -d /dev/shm/pegaflow-fuzz.XXXXXX)
export PEGAFLOW_FUZZ_DIR
trap 'rm -rf "$PEGAFLOW_FUZZ_DIR"' EXIT

failed=0
for target in "${targets[@]}"; do
    learnt=$built/corpus/$target
    mkdir -p "$learnt" "artifacts/$target" "corpus/$target" "regressions/$target"
    # A thread that brings the pool into the page tables may outlive its input, which looks like a
    # leak; `make asan` looks for real ones.
    options=(-artifact_prefix="artifacts/$target/" -timeout=60 -rss_limit_mb=2048
        -max_len=16384 -print_final_stats=1 -detect_leaks=0)
    [[ -e dictionaries/$target ]] && options+=(-dict="dictionaries/$target")
    echo "==> $target for $seconds s of CPU time"
    status=0
    # The time limit ends it with SIGXCPU: status 152 is a run without a finding.
    prlimit --cpu="$seconds:$((seconds + 60))" "$built/x86_64-unknown-linux-gnu/release/$target" \
        "${options[@]}" "$learnt" "corpus/$target" "regressions/$target" \
        2>"$built/$target.log" || status=$?
    grep -E '^#[0-9]+' "$built/$target.log" | tail -n 1 || true
    if ((status != 152 && status != 0)); then
        echo "$target: status $status; its last lines:"
        tail -n 40 "$built/$target.log"
        failed=1
    fi
done
((failed == 0))
