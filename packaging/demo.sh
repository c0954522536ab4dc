#!/usr/bin/env bash
# The main job on a machine without a GPU: builds the release, starts a daemon of its own, replays a
# generated workload through two engines of two ranks each (four worker processes with their own KV
# memory), verifies every loaded byte, shows the daemon's state, stops it and shows what is left.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
pool=${DEMO_POOL_SIZE:-512MiB}
page_bytes=${DEMO_PAGE_BYTES:-65536}

if ! command -v cargo >/dev/null; then
    echo "make demo: cargo is missing; install Rust from https://rustup.rs" >&2
    exit 1
fi
if ! command -v cc >/dev/null; then
    echo "make demo: a C compiler is missing; on Debian: apt-get install build-essential" >&2
    exit 1
fi

echo '==> Building (release)'
cargo build --release --locked --quiet -p pegaflow-engine -p pegaflow-tools
pegaflowd=$target/release/pegaflowd
pegactl=$target/release/pegactl

scratch=$(mktemp -d "${TMPDIR:-/tmp}/pegaflow-demo.XXXXXX")
node=demo-$$
socket=$scratch/pegaflow.sock
shm=${PEGAFLOW_SHM_DIR:-/dev/shm/pegaflow}/$node
daemon=

finish() {
    local status=$?
    if [[ -n $daemon ]] && kill -0 "$daemon" 2>/dev/null; then
        kill -TERM "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    fi
    if ((status != 0)) && [[ -s $scratch/daemon.log ]]; then
        echo "--- the daemon's log" >&2
        tail -n 40 "$scratch/daemon.log" >&2
    fi
    rm -rf "$scratch" "$shm"
    exit "$status"
}
trap finish EXIT

echo "==> Starting pegaflowd (node $node, pool $pool)"
"$pegaflowd" --node "$node" --socket "$socket" --pool-size "$pool" --http 127.0.0.1:0 \
    >"$scratch/daemon.log" 2>&1 &
daemon=$!
for _ in $(seq 300); do
    [[ -S $socket ]] && break
    kill -0 "$daemon" 2>/dev/null || { echo "pegaflowd ended before it was ready" >&2; exit 1; }
    sleep 0.1
done
[[ -S $socket ]] || { echo "pegaflowd did not open $socket within 30 s" >&2; exit 1; }

echo '==> Replaying a workload: 2 engines x 2 ranks, every loaded byte verified'
"$pegactl" --node "$node" replay --socket "$socket" --engines 2 --ranks 2 --page-bytes "$page_bytes"

echo
echo '==> pegactl status'
"$pegactl" --node "$node" status

echo
echo '==> Stopping the daemon with SIGTERM'
kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
if ((status != 0)); then
    echo "pegaflowd exited with status $status" >&2
    exit 1
fi
if [[ -e $socket ]]; then
    echo "the socket $socket is left over" >&2
    exit 1
fi
echo "exit status 0, socket removed"
if [[ -d $shm ]]; then
    kept=$(du -sh "$shm" | cut -f1)
    echo "kept for the next start of node $node, because the cache survives a restart: $kept"
    rm -rf "$shm"
    echo "removed by the demo; nothing is left"
fi
