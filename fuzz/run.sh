#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Builds the fuzz targets and runs them, each for some seconds, from the corpus in the tree, which stays as it is.
#
#     fuzz/run.sh [SECONDS [TARGET...]]        default: 10 seconds of each
#     fuzz/run.sh merge [TARGET...]            takes what longer runs found into the corpus, and minimises it
#
# It needs cargo and a C++ compiler (libFuzzer comes with its crate as source): no nightly toolchain, no clang, no cargo-fuzz.
# What those set is set here: the compiler's own coverage pass is behind stable options. With FUZZ_SANITIZER=address, and a
# toolchain that has the runtime (rustup's do, Debian's doesn't), AddressSanitizer as well.
#
# New inputs are kept in fuzz/target/corpus and used by the next run. A failure leaves its input in fuzz/artifacts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ "${1:-}" = merge ]; then
	mode=merge seconds=0
	shift
else
	mode=run seconds=${1:-10}
	shift $(($# > 0))
fi
case $seconds in *[!0-9]* | '')
	echo "fuzz: $seconds is not a number of seconds" >&2
	exit 2
	;;
esac
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(cd fuzz_targets && ls -- *.rs | sed 's/\.rs$//')
for target in "${targets[@]}"; do
	[ -e "fuzz_targets/$target.rs" ] || {
		echo "fuzz: there is no target $target" >&2
		exit 2
	}
done
for tool in cargo c++; do
	command -v $tool >/dev/null || {
		echo "fuzz: $tool is missing (Debian: cargo, g++)" >&2
		exit 1
	}
done

host=$(rustc -vV | sed -n 's/^host: //p')
built=${CARGO_TARGET_DIR:-$PWD/target}
flags=(
	--cfg fuzzing
	-Cpasses=sancov-module
	-Cllvm-args=-sanitizer-coverage-level=4
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters
	-Cllvm-args=-sanitizer-coverage-pc-table
	-Cllvm-args=-sanitizer-coverage-trace-compares
)
case ${FUZZ_SANITIZER:-none} in
none) ;;
address)
	# The only part that isn't stable; the variable lets a stable compiler take it.
	export RUSTC_BOOTSTRAP=1
	flags+=(-Zsanitizer=address)
	built=$built/address
	;;
*)
	echo "fuzz: FUZZ_SANITIZER is none or address" >&2
	exit 2
	;;
esac
bins=()
for target in "${targets[@]}"; do bins+=(--bin "$target"); done
# --target keeps the flags from build scripts and procedural macros.
CARGO_TARGET_DIR=$built RUSTFLAGS="${flags[*]}" cargo build --locked --release --target "$host" "${bins[@]}"

found=$built/corpus
mkdir -p artifacts "$found"
failed=()
for target in "${targets[@]}"; do
	mkdir -p "$found/$target" "corpus/$target"
	run=("$built/$host/release/$target" -artifact_prefix="$PWD/artifacts/$target-" -timeout=60 -rss_limit_mb=4096)
	if [ $mode = merge ]; then
		fresh=$(mktemp -d)
		# As few as reach every edge, not every count of one: the tree stays small.
		"${run[@]}" -set_cover_merge=1 -use_counters=0 -max_len=512 "$fresh" "corpus/$target" "$found/$target" 2>&1 | tail -n 1
		rm -rf "corpus/$target"
		mv "$fresh" "corpus/$target"
		chmod 755 "corpus/$target"
		continue
	fi
	echo "==> $target, $seconds s"
	log=$(mktemp)
	# The first directory is written to, the others are only read.
	if "${run[@]}" -max_total_time="$seconds" -max_len=4096 -print_final_stats=1 "$found/$target" "corpus/$target" \
		>"$log" 2>&1; then
		grep -E 'DONE|number_of_executed_units' "$log" || tail -n 3 "$log"
		rm -f "$log"
	else
		tail -n 200 "$log"
		artifact=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
		echo "fuzz: $target failed; the whole log is $log" >&2
		[ -z "$artifact" ] || printf 'fuzz: its input is %s; once more:\n    %s %s\n' \
			"$artifact" "$built/$host/release/$target" "$artifact" >&2
		failed+=("$target")
	fi
done
if [ ${#failed[@]} -gt 0 ]; then
	echo "fuzz: failed: ${failed[*]}" >&2
	exit 1
fi
