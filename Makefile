# Everything a developer does. `make` alone lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET_DIR)/release
KERNELS := engine/src/device/kernels
# Where the system looks for units; empty leaves the unit out.
UNITDIR ?= $(PREFIX)/lib/systemd/system

LOOM_FLAGS := RUSTFLAGS="--cfg loom" CARGO_PROFILE_RELEASE_LTO=off \
    CARGO_TARGET_DIR=$(TARGET_DIR)/loom
SOAK_TRIALS ?= 10000
CYCLES ?= 1000
FUZZ_SECONDS ?= 1800
FUZZ_TARGET ?=
# Processes that share the CPU time of a target.
FUZZ_JOBS ?= 1
ASAN_PACKAGES ?= -p pegaflow-client
ASAN_TESTS ?=
TSAN_TESTS ?=
# Sanitizers are unstable options of the compiler; the compiler is the stable one.
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
SANITIZED := RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0
SANITIZED_TEST := $(CARGO) test --target $(HOST) --lib -p pegaflow-shm -p pegaflow-engine
# What `make deny` looks at; without network, leave `advisories` out.
DENY_CHECKS ?= advisories bans licenses sources

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  Variables: CARGO_TARGET_DIR (build output), PREFIX and DESTDIR (install),'
	@echo '  SOAK_TRIALS and CYCLES (soak), FUZZ_SECONDS, FUZZ_JOBS and FUZZ_TARGET (fuzz),'
	@echo '  SIM_SEEDS and SIM_SEED (sim), ARGS (bench-*, chaos, mutants).'

.PHONY: build
build: ## build daemon, tools and library (release)
	$(CARGO) build --release -p pegaflow-engine -p pegaflow-tools --bins
	$(CARGO) build --release -p pegaflow-client

.PHONY: lib
lib: ## build libpegaflow.so with symbol versions, and its pkg-config file
	client-c/build-so.sh

.PHONY: test
test: ## all tests: units, whole system, documentation, loom models in reduced form
	$(CARGO) build --workspace --bins --tests
	$(CARGO) test --workspace --no-fail-fast
	$(MAKE) --no-print-directory loom-quick

.PHONY: loom-quick
loom-quick: ## loom models with at most two preemptions
	$(LOOM_FLAGS) LOOM_MAX_PREEMPTIONS=2 $(CARGO) test --release -p pegaflow-shm --tests

.PHONY: loom
loom: ## loom models with the bounds that each model names (many minutes)
	$(LOOM_FLAGS) $(CARGO) test --release -p pegaflow-shm --tests -- --nocapture

.PHONY: miri
miri: ## run what Miri can (needs a nightly toolchain with the miri component)
	@if ! $(CARGO) +nightly miri --version >/dev/null 2>&1; then \
	    echo 'make miri: NOT RUN. Miri needs a nightly toolchain:' >&2; \
	    echo '    rustup toolchain install nightly --component miri,rust-src' >&2; \
	    echo 'docs/decisions/0018-what-covers-for-miri.md says what covers for it meanwhile.' >&2; \
	    exit 1; \
	fi
	MIRIFLAGS=-Zmiri-disable-isolation $(CARGO) +nightly miri test -p pegaflow-shm --lib

.PHONY: asan
asan: ## unit tests under AddressSanitizer, leaks included
	$(SANITIZED) RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$(TARGET_DIR)/asan \
	    $(SANITIZED_TEST) $(ASAN_PACKAGES) -- $(ASAN_TESTS)

.PHONY: asan-quick
asan-quick: ## AddressSanitizer on what maps, copies and adopts
	$(MAKE) --no-print-directory asan ASAN_PACKAGES= \
	    ASAN_TESTS='catalog:: copy:: fuzz:: index:: mapping:: pool:: ring::'

# The standard library's locks are invisible to ThreadSanitizer unless it is built along, for which
# its sources must be there (rustup component add rust-src).
STD_SOURCES := $(wildcard $(shell rustc --print sysroot)/lib/rustlib/src/rust/library/Cargo.lock)
TSAN_ALL := $(if $(STD_SOURCES),-Zbuild-std -p pegaflow-engine -p pegaflow-client)

.PHONY: tsan
tsan: ## unit tests under ThreadSanitizer (engine and library too where rust-src is installed)
	@[[ -n '$(STD_SOURCES)' ]] || \
	    echo 'make tsan: rust-src is not installed: engine and library are LEFT OUT' >&2
	$(SANITIZED) RUSTFLAGS='-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer' \
	    CARGO_TARGET_DIR=$(TARGET_DIR)/tsan TSAN_OPTIONS=suppressions=$(CURDIR)/.ci/tsan.supp \
	    $(CARGO) test --target $(HOST) --lib -p pegaflow-shm $(TSAN_ALL) \
	    -- --test-threads=1 $(TSAN_TESTS)

.PHONY: tsan-quick
tsan-quick: ## ThreadSanitizer on rings, bells and index
	$(MAKE) --no-print-directory tsan TSAN_ALL= TSAN_TESTS='bell:: index::tests ring::'

.PHONY: fmt
fmt: ## format the sources
	$(CARGO) fmt --all

.PHONY: lint
lint: ## formatting, clippy, style rules, C header
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	python3 .ci/style.py
	python3 .ci/mutants.py --check
	$(MAKE) --no-print-directory check-header

# Tools for the package in python/, in the versions that its development was done with.
VENV := $(abspath $(TARGET_DIR))/venv
PYTHON ?= python3

$(VENV)/ready: python/requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.PHONY: python-venv
python-venv: $(VENV)/ready ## install the tools for the Python package under target/

.PHONY: lint-python
lint-python: python-venv ## ruff (rules and format) and mypy --strict over the package
	$(VENV)/bin/ruff check python
	$(VENV)/bin/ruff format --check --quiet python
	cd python && $(VENV)/bin/mypy --strict pegaflow tests examples benchmarks

.PHONY: test-python
test-python: python-venv ## tests of the Python package with a real daemon; no vLLM, no GPU
	$(CARGO) build --workspace --lib --bins
	cd python && $(VENV)/bin/pytest -q $(ARGS)

.PHONY: wheel
wheel: ## build the Python wheel (glibc 2.28 or later) and source distribution into python/dist
	packaging/wheel.sh

.PHONY: check-wheel
check-wheel: ## install the wheel into a fresh environment, use it; pack it again: the same bytes
	packaging/wheel-check.sh

.PHONY: bench-python
bench-python: build python-venv ## what a query of 32,768 blocks costs a Python scheduler, and where
	cd python && PEGAFLOW_BIN_DIR=$(abspath $(RELEASE)) \
	    PEGAFLOW_LIBRARY=$(abspath $(RELEASE))/libpegaflow.so \
	    $(VENV)/bin/python -m benchmarks.scheduler_cost $(ARGS)

.PHONY: deny
deny: ## licences, advisories and sources of all dependencies (needs cargo-deny)
	@command -v cargo-deny >/dev/null || \
	    { echo 'make deny: install it first: cargo install --locked cargo-deny' >&2; exit 1; }
	cargo-deny --log-level error check $(DENY_CHECKS)
	cargo-deny --log-level error --manifest-path fuzz/Cargo.toml check $(DENY_CHECKS)
	packaging/third-party.sh --check

.PHONY: ptx
ptx: ## compile the GPU kernels to the committed PTX (fetches NVRTC with pip, needs no GPU)
	python3 $(KERNELS)/build.py $(TARGET_DIR)/nvrtc

.PHONY: test-kernels
test-kernels: ## run the source of the GPU kernels on the processor
	mkdir -p $(TARGET_DIR)/kernels
	$(CXX) -std=c++20 -O1 -pthread -Wall -Werror -Wno-unknown-pragmas \
	    $(KERNELS)/test.cc -o $(TARGET_DIR)/kernels/test
	$(TARGET_DIR)/kernels/test

.PHONY: check-ptx
check-ptx: test-kernels ## compare the committed PTX with what its source gives
	python3 $(KERNELS)/build.py $(TARGET_DIR)/nvrtc --check

.PHONY: check-header
check-header: ## compare pegaflow.h with what the code exports
	client-c/check-header.sh

.PHONY: demo
demo: ## build, start a daemon, replay a workload through engine processes, show the table
	packaging/demo.sh

.PHONY: test-vllm
test-vllm: ## tests of the connector with a real vLLM on the CPU (installs vLLM once, 6 GB)
	$(CARGO) build --workspace --lib --bins
	PEGAFLOW_BIN_DIR=$(abspath $(TARGET_DIR))/debug python/tests/vllm/run.sh $(ARGS)

.PHONY: demo-vllm
demo-vllm: ## a real vLLM on the CPU: a tiny model cold, a restart, warm (installs vLLM once, 6 GB)
	$(CARGO) build --workspace --lib --bins
	python=$$(python/tests/vllm/setup.sh) && cd python && \
	    PEGAFLOW_BIN_DIR=$(abspath $(TARGET_DIR))/debug "$$python" -m examples.demo

.PHONY: soak
soak: export PEGAFLOW_BIN_DIR := $(abspath $(RELEASE))
soak: build ## kill -9 of clients and daemons at random, SOAK_TRIALS times (hours)
	PEGAFLOW_KILL_TRIALS=$(SOAK_TRIALS) $(CARGO) test --release -p pegaflow-tests -- --nocapture kill
	PEGAFLOW_KILL_TRIALS=$(SOAK_TRIALS) $(CARGO) test --release -p pegaflow-shm -- --nocapture kill
	PEGAFLOW_CYCLES=$(CYCLES) $(CARGO) test --release -p pegaflow-tests -- --nocapture cycles
	PEGAFLOW_SSD_CRASHES=$(CYCLES) $(CARGO) test --release -p pegaflow-tests -- --nocapture ssd::cr

.PHONY: ssd-crash
ssd-crash: build ## 10,000 simulated power losses, 200 kills of who writes shards, 200 of a daemon
	PEGAFLOW_SSD_POWER_LOSSES=10000 PEGAFLOW_SSD_KILLS=200 \
	    $(CARGO) test --release -p pegaflow-ssd -- --nocapture power kill
	PEGAFLOW_SSD_CRASHES=200 PEGAFLOW_BIN_DIR=$(abspath $(RELEASE)) \
	    $(CARGO) test --release -p pegaflow-tests --test system -- --nocapture ssd::crashes

.PHONY: chaos
chaos: build ## kill -9 of daemon and engines under load, CHAOS_KILLS=200 times (minutes)
	$(CARGO) build --release -p pegaflow-tests --bin chaos
	PEGAFLOW_BIN_DIR=$(abspath $(RELEASE)) $(RELEASE)/chaos $(ARGS)

.PHONY: gpu-soak
gpu-soak: build ## random saves and loads of GPU memory, engines killed, for GPU_SOAK_SECONDS=60
	$(CARGO) build --release -p pegaflow-tests --bin gpu-soak --bin gpu-engine
	PEGAFLOW_BIN_DIR=$(abspath $(RELEASE)) $(RELEASE)/gpu-soak

.PHONY: sim
sim: ## simulate daemon and clients with injected faults, SIM_SEEDS seeds; SIM_SEED=N replays one
	SIM_SEEDS=$(or $(SIM_SEEDS),3000) SIM_SEED=$(SIM_SEED) \
	    $(CARGO) test -p pegaflow-engine --lib -- --nocapture sim::runs::no_seed

.PHONY: mutants
mutants: ## remove each invariant's guard in a copy of the tree; its test must fail
	python3 .ci/mutants.py $(ARGS)

.PHONY: fuzz
fuzz: ## libFuzzer on each target for FUZZ_SECONDS of CPU time, or on FUZZ_TARGET alone
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_JOBS=$(FUZZ_JOBS) FUZZ_TARGET='$(FUZZ_TARGET)' fuzz/run.sh

.PHONY: fuzz-seeds
fuzz-seeds: ## write the seed corpus of the fuzz targets anew, as this version speaks
	PEGAFLOW_FUZZ_WRITE_SEEDS=1 $(CARGO) test -p pegaflow-engine -p pegaflow-ssd --lib fuzz::

.PHONY: proptest
proptest: ## property tests, fuzz targets without libFuzzer and hostile clients, many more cases
	PROPTEST_CASES=100000 PEGAFLOW_FUZZ_CASES=100000 \
	    $(CARGO) test --release -p pegaflow-shm -p pegaflow-engine -p pegaflow-ssd
	PEGAFLOW_HOSTILE_TRIALS=10000 $(CARGO) test --release -p pegaflow-tests -- --nocapture hostile

.PHONY: bench
bench: build ## latency and throughput of queries and saves on this machine
	$(RELEASE)/pegactl bench query --blocks 8192 $(ARGS)
	$(RELEASE)/pegactl bench save --blocks 8192 --page-bytes 1024 $(ARGS)
	$(RELEASE)/pegactl bench save --blocks 256 --page-bytes 2097152 $(ARGS)

.PHONY: bench-rings
bench-rings: build ## rings against raw ping-pongs and a textbook ring
	$(RELEASE)/pegactl bench rings $(ARGS)

.PHONY: bench-restart
bench-restart: build ## time from exec to the first hit over full pools (up to 8 GiB of /dev/shm)
	$(RELEASE)/pegactl bench restart $(ARGS)

.PHONY: bench-peers
bench-peers: ## rings beside iceoryx2, crossbeam and rtrb in one run
	$(CARGO) bench -p pegaflow-benches --features peers --bench rings $(ARGS)

.PHONY: bench-hostile
bench-hostile: build ## what a well-behaved client feels of each hostile neighbour
	PEGAFLOW_BIN_DIR=$(abspath $(RELEASE)) \
	    $(CARGO) bench -p pegaflow-benches --bench hostile -- $(ARGS)

.PHONY: install
install: build lib ## install binaries, library, header, pkg-config file and unit under PREFIX
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(RELEASE)/pegaflowd $(RELEASE)/pegactl $(DESTDIR)$(PREFIX)/bin/
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' client-c/build-so.sh --install
	if [[ -n '$(UNITDIR)' && -f packaging/pegaflowd.service ]]; then \
	    install -d $(DESTDIR)$(UNITDIR); \
	    sed 's|^ExecStart=/usr/local/|ExecStart=$(PREFIX)/|' packaging/pegaflowd.service \
	        > $(DESTDIR)$(UNITDIR)/pegaflowd.service; \
	fi
	install -D -m 644 LICENSE $(DESTDIR)$(PREFIX)/share/doc/pegaflow/LICENSE
	install -m 644 NOTICE packaging/THIRD-PARTY.md $(DESTDIR)$(PREFIX)/share/doc/pegaflow/

.PHONY: clean
clean: ## remove build output
	$(CARGO) clean
