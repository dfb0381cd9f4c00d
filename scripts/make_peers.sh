#!/usr/bin/env bash
# Installs the peers of `make bench` into .venv/peers, away from the environment itself. What cannot be had is skipped by the benchmark, with its reason.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=.venv/peers
[ -e "$target/.ready" ] && exit 0
mkdir -p "$target"
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --target "$target" --upgrade)

"${pip[@]}" --no-deps 'mambapy>=1.2' || echo "make bench: mambapy cannot be had" >&2
"${pip[@]}" -c constraints-cpu.txt 'transformers>=5.20' || echo "make bench: transformers cannot be had" >&2
# Only its slow reference is wanted, a plain Python function: no kernels are built.
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "${pip[@]}" --no-deps --no-build-isolation 'mamba-ssm==2.3.2.post1' ||
    echo "make bench: mamba-ssm cannot be had" >&2
touch "$target/.ready"
