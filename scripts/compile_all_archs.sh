#!/usr/bin/env bash
# Build the kernel library for each architecture given (default: all that are supported) as `arfusion build` does, in
# a fresh cache, and print the time that each took. Needs nvcc and an installed package; no GPU.
#
#   scripts/compile_all_archs.sh [80 90a 100a 120a]
set -euo pipefail
cd "$(dirname "$0")/.."

archs=("$@")
[ ${#archs[@]} -gt 0 ] || archs=(80 90a 100a 120a)
if [ -z "$(find kernels -maxdepth 1 -name '*.cu' -print -quit)" ]; then
    echo "no CUDA sources under kernels/"
    exit 0
fi

ARFUSION_CACHE_DIR=$(mktemp -d)
export ARFUSION_CACHE_DIR
trap 'rm -rf "$ARFUSION_CACHE_DIR"' EXIT
for arch in "${archs[@]}"; do
    start=$SECONDS
    "${PYTHON:-python}" -m arfusion_pass.cli build --arch "$arch" >/dev/null
    printf 'sm_%s: %d s\n' "$arch" "$((SECONDS - start))"
done
