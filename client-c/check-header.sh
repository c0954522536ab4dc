#!/usr/bin/env bash
# Compares include/pegaflow.h and pegaflow.map with what the library exports: names, signatures,
# constants, struct layouts, and that it compiles as C11 and as C++17 without a warning.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${CARGO:-cargo}" test --quiet -p pegaflow-client --test header "$@"
