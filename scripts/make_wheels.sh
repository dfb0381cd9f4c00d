#!/usr/bin/env bash
# Collects what `make bench-gpu` wants beside torch, triton and numpy into build/wheels: wheels of pure Python, which fit any machine (benchmarks/bare.py
# unpacks them there). What cannot be had is skipped by the benchmark, with its reason.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=build/wheels
rm -rf "$target"
mkdir -p "$target"
pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)

for name in einops packaging monai 'mambapy>=1.2' 'transformers>=5.20'; do
    "${pip[@]}" download --no-deps --only-binary :all: -c constraints-cpu.txt --dest "$target" "$name" || echo "make wheels-gpu: $name cannot be had" >&2
done
# Its slow reference alone, a plain Python function; where its kernels are installed, those are found first.
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$target" 'mamba-ssm==2.3.2.post1' ||
    echo "make wheels-gpu: mamba-ssm cannot be had" >&2
for wheel in "$target"/*.whl; do
    case $wheel in
    *-none-any.whl) ;;
    *) echo "make wheels-gpu: $wheel is not of pure Python, and is left out" >&2 && rm "$wheel" ;;
    esac
done
du -sh "$target"
