#!/usr/bin/env bash
# Writes constraints-cpu.txt: one resolution of pyproject.toml's defaults and of every extra but `cuda`, for Python 3.11, 3.12 and 3.13.
# Versions that still fit stay as they are. `bash scripts/make_lock.sh --upgrade` takes the newest, `--upgrade-package NAME` that of one.
# `cuda` is left out, for it builds beside a GPU alone; so are the CUDA packages that torch names, for the torch build decides.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock=constraints-cpu.txt
torch=2.13.0 # without a tag of the build such as +cpu, which would keep a GPU machine from its CUDA build
extras=(dev onnx voila zoo tensorboard bench slurm site)
uv=.venv/bin/uv
[ -x "$uv" ] || uv=uv

new=$(mktemp)
trap 'rm -f "$new"' EXIT
cp "$lock" "$new" # what stands there is kept where it fits
echo "torch==$torch" | "$uv" pip compile - pyproject.toml "${extras[@]/#/--extra=}" --universal --python-version 3.11 --fork-strategy fewest \
    --no-header --no-annotate --quiet --output-file "$new" "$@"
{
    echo "# One resolution for Python 3.11, 3.12 and 3.13, made by: bash scripts/make_lock.sh"
    echo "# The tests run with these versions of the defaults and of dev; the other extras but cuda are here too."
    grep -vE '^(cuda|nvidia|triton|#)' "$new"
} >"$lock"
echo "make_lock: $(grep -c == "$lock") packages in $lock"
