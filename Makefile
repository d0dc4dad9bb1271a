# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Each goal does all the set-up it needs on a Debian machine with Python >= 3.11 and cargo, and only what is
# missing: a second run does nothing of it and needs no network. Python things live in .venv, guest images in
# the cache (see images/README.md).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST_MINIMUM := 1.87
FUZZ_SECONDS ?= 6

# The tests of the native module's crate need no Python, so a machine without libpython's development files can link them.
export PYO3_BUILD_EXTENSION_MODULE := 1

# A goal's steps are announced on lines of their own.
STEP := step() { printf '\n==> %s\n' "$$*"; }; step

# Everything the native module and the installed package are made of.
NATIVE_INPUTS = Cargo.toml Cargo.lock pyproject.toml $(shell find rust benches -name Cargo.toml -o -name '*.rs' | LC_ALL=C sort)

.PHONY: help setup system rust venv native images demo demo-vvu vvu-bridge test fuzz bench matrix clean

help: ## this text
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: native ## system packages, Rust tools, .venv and the native module
	@

# Each line: what proves that it is there, and the package to install if it is not.
system:
	@missing=()
	have() { command -v "$$1" >/dev/null 2>&1 || missing+=("$$2"); }
	have qemu-system-x86_64 qemu-system-x86
	# Bookworm has it in qemu-system-common, later releases in qemu-utils.
	have qemu-storage-daemon qemu-utils
	have cpio cpio
	have cc build-essential
	have dpkg-deb dpkg
	# A dynamically linked busybox would not start in the guest.
	{ command -v busybox >/dev/null && ! head -c 4096 "$$(command -v busybox)" | grep -q ld-linux; } || missing+=(busybox-static)
	[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || [ -e /usr/share/keyrings/debian-archive-keyring.pgp ] \
		|| missing+=(debian-archive-keyring)
	if ! command -v $(PYTHON) >/dev/null; then
		missing+=(python3 python3-venv)
	elif [ ! -x $(BIN)/python ] && ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then
		missing+=(python3-venv)
	fi
	if [ $${#missing[@]} -gt 0 ]; then
		install=(apt-get install -y --no-install-recommends "$${missing[@]}")
		root=()
		if [ "$$(id -u)" != 0 ]; then
			if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
				root=(sudo -n)
			elif command -v sudo >/dev/null && [ -t 0 ]; then
				root=(sudo)
			else
				echo "setup: these packages are missing and there is no way to become root; run as root:" >&2
				echo "    apt-get update && $${install[*]}" >&2
				exit 1
			fi
		fi
		$(STEP) "system packages: $${missing[*]}"
		"$${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update
		"$${root[@]}" env DEBIAN_FRONTEND=noninteractive "$${install[@]}"
	fi
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
		echo "setup: $$($(PYTHON) --version) is too old: 3.11 or later is needed (make PYTHON=... names another one)" >&2
		exit 1
	}

rust: system
	@command -v cargo >/dev/null || { echo "setup: cargo is missing: install Rust $(RUST_MINIMUM) or later" >&2; exit 1; }
	found=$$(cargo --version | cut -d' ' -f2)
	[ "$$(printf '%s\n' $(RUST_MINIMUM) "$$found" | sort -V | head -n1)" = $(RUST_MINIMUM) ] || {
		echo "setup: cargo $$found is too old: $(RUST_MINIMUM) or later is needed" >&2
		exit 1
	}

venv: system
	@key="$$($(PYTHON) -VV) $$($(PYTHON) -c 'import sys; print(sys.base_prefix)')"
	if ! { $(BIN)/python -c pass && $(BIN)/python -m pip --version; } >/dev/null 2>&1; then
		$(STEP) "Python environment in $(VENV) ($$key)"
		rm -rf $(VENV)
		$(PYTHON) -m venv $(VENV)
	fi
	if ! $(BIN)/maturin --version >/dev/null 2>&1; then
		$(STEP) "the build tool maturin"
		$(BIN)/python -m pip install --disable-pip-version-check 'maturin>=1.9.4,<2'
	fi

# The key is the content of all inputs, so neither a fresh clone's times nor a touched file lead to a rebuild.
native: rust venv
	@key=$$({ $(BIN)/python -VV; cargo --version; sha256sum $(NATIVE_INPUTS); } | sha256sum | cut -d' ' -f1)
	if [ "$$(cat $(VENV)/native.key 2>/dev/null)" != "$$key" ] || ! $(BIN)/python -c 'import vhu_legacy._native' 2>/dev/null \
		|| [ ! -x $(BIN)/vhu-legacy ]; then
		$(STEP) "Python packages and the native module"
		env -u CONDA_PREFIX VIRTUAL_ENV="$$PWD/$(VENV)" $(BIN)/maturin develop --release --locked --extras dev
		echo "$$key" >$(VENV)/native.key
	fi

images: native ## guest kernels 5.10, 6.1, 6.12, 7.2, QEMU 11.1 and vhost-user daemons, into the cache
	@$(STEP) "guest images"
	$(BIN)/python -m vhu_legacy.images $(IMAGES)

demo: native ## stock guests with a legacy driver on members, over vhost-user and by admin commands
	@$(BIN)/python -m vhu_legacy.demo

# What runs in a guest that is a back end: static, since that guest has no libraries of this machine's. Cargo knows what is
# up to date; a target of its own keeps the flags away from build scripts, and from what else is in target/.
BRIDGE_CARGO = RUSTFLAGS='-C target-feature=+crt-static' \
	cargo build --locked --profile guest --target x86_64-unknown-linux-gnu

vvu-bridge: rust ## the programs of a guest that is another guest's back end
	@$(STEP) "vvu-bridge and vhu-blk"
	$(BRIDGE_CARGO) --package vvu-bridge
	$(BRIDGE_CARGO) --package vhu-core --example vhu-blk

demo-vvu: native vvu-bridge ## a guest whose disk and file system are in another guest, over virtio-vhost-user
	@$(BIN)/python -m vhu_legacy.demo_vvu $(DEMO_ARGS)

# Components of a rustup toolchain, or packages of the distribution's; and cargo-nextest.
.PHONY: test-tools
test-tools: native
	@for tool in fmt clippy; do
		cargo $$tool --version >/dev/null 2>&1 && continue
		$(STEP) "cargo $$tool"
		if command -v rustup >/dev/null; then
			rustup component add "$${tool/#fmt/rustfmt}"
		else
			echo "setup: cargo $$tool is missing: install the packages rustfmt and rust-clippy" >&2
			exit 1
		fi
	done
	if ! cargo nextest --version >/dev/null 2>&1; then
		$(STEP) "cargo nextest (built once, a few minutes)"
		# The newest that Rust $(RUST_MINIMUM) can build.
		cargo install --locked cargo-nextest@0.9.100
	fi

test: test-tools vvu-bridge ## everything CI runs: format, lints, types, Rust and Python tests, with guests
	@$(STEP) "guest images"
	$(BIN)/python -m vhu_legacy.images kernel:5.10 kernel:6.1 kernel:6.12 kernel:7.2 qemu:11.1 daemons:trixie
	$(STEP) "cargo fmt"
	cargo fmt --all --check
	$(STEP) "cargo clippy"
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(STEP) "cargo nextest"
	cargo nextest run --locked --workspace
	$(STEP) "fuzzing, $(FUZZ_SECONDS) s a target"
	fuzz/run.sh $(FUZZ_SECONDS)
	$(STEP) "stubtest"
	$(BIN)/python -m mypy.stubtest vhu_legacy._native
	$(STEP) "mypy"
	$(BIN)/mypy
	$(STEP) "ruff"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(STEP) "pytest"
	$(BIN)/python -m pytest -m "not matrix" $(PYTEST_ARGS)
	$(STEP) "all passed"

fuzz: rust ## the fuzz targets, FUZZ_SECONDS each (default 6)
	@fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)

# What the plot needs: the extra `bench` of pyproject.toml.
.PHONY: bench-tools
bench-tools: native
	@if ! $(BIN)/python -c 'import matplotlib' 2>/dev/null; then
		$(STEP) "matplotlib, for the plot"
		$(BIN)/python -m pip install --disable-pip-version-check 'matplotlib>=3.8,<4'
	fi

# Less than twenty minutes; with BENCH_ARGS=--quick two minutes. Other options are run.py's alone.
bench: bench-tools ## every speed we promise, next to the peer's, as ratios: requests, rings, scale, restart, doorbells, boots
	@quick="$(filter --quick,$(BENCH_ARGS))"
	cargo build --locked --release --package vhu-bench
	bin="$${CARGO_TARGET_DIR:-target}/release"
	$(STEP) "requests: our blk member and qemu-storage-daemon"
	$(BIN)/python benches/run.py $(BENCH_ARGS)
	case " $(BENCH_ARGS) " in
		*--only*|*--no-sweep*) ;;
		*) $(BIN)/python benches/plot.py ;;
	esac
	$(STEP) "the ring engine alone"
	"$$bin/vhu-bench-engine" $$quick
	$(STEP) "many attached members"
	$(BIN)/python benches/scale.py $$quick
	$(STEP) "kill and restart"
	$(BIN)/python benches/restart.py $$quick
	$(STEP) "administration commands and I/O BAR accesses"
	"$$bin/vhu-bench-owner" $$quick
	$(STEP) "notifications and requests through a virtio-vhost-user device"
	$(BIN)/python benches/vvu.py $$quick
	$(STEP) "boots through the legacy function"
	$(BIN)/python -m vhu_legacy.images kernel:6.12 qemu:11.1
	$(BIN)/python benches/boot.py $$quick

matrix: native vvu-bridge ## all kernels x driver modes x QEMUs, JUnit XML in matrix.xml; and the tests that are too many for `make test`
	@$(BIN)/vhu-legacy matrix --junit matrix.xml $(MATRIX_ARGS)
	$(BIN)/python -m pytest -m matrix
	$(BIN)/python -m vhu_legacy.demo_vvu

clean: ## remove what was built here (not the cache of guest images)
	@rm -rf $(VENV) target fuzz/target fuzz/artifacts build dist vhu_legacy/_native*.so matrix.xml
