#!/usr/bin/env bash
# Compile every kernels/**/*.cu with nvcc alone, for each architecture given (default: all that are supported),
# and print the time each architecture took. Objects go to a temporary folder. No GPU needed.
#
#   scripts/compile_all_archs.sh [80 90a 100a 120a]
set -euo pipefail
cd "$(dirname "$0")/.."

archs=("$@")
[ ${#archs[@]} -gt 0 ] || archs=(80 90a 100a 120a)
jobs=${MAX_JOBS:-$(nproc)}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

mapfile -t sources < <(find kernels -name '*.cu' | sort)
[ ${#sources[@]} -gt 0 ] || { echo "no .cu files under kernels/"; exit 0; }

for arch in "${archs[@]}"; do
    start=$SECONDS
    printf '%s\n' "${sources[@]}" | xargs -P "$jobs" -I{} bash -c '
        nvcc -std=c++17 -O3 -Xcompiler -fPIC --expt-relaxed-constexpr -Ikernels \
            -gencode "arch=compute_$1,code=sm_$1" -c "$2" -o "$3/$1_$(echo "$2" | tr / _).o"' _ "$arch" {} "$out"
    printf 'sm_%s: %d files in %d s\n' "$arch" "${#sources[@]}" "$((SECONDS - start))"
done
