#!/usr/bin/env bash
# Installs homelib with its default and development dependencies into .venv, at the versions of constraints-cpu.txt.
# `make env` calls it; PYTHON names the interpreter. Only a .venv that this script made is ever replaced.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$(pwd -P)
ready=.venv/.homelib-ready # holds the folder that .venv was installed for; the Makefile compares both
half=.venv/.homelib-half   # there from the first step to the last: what an interrupted installation leaves is not believed
python=${PYTHON:-python3}
started=$(date +%s)

fail() {
    echo "make env: $1" >&2
    exit 1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if ! supported "$python" && [ "$python" = python3 ]; then
    for python in python3.13 python3.12 python3.11 python3; do supported "$python" && break; done
fi
supported "$python" || fail "$python is $("$python" -V 2>/dev/null || echo "not a working Python"), and homelib needs 3.11 to 3.13: install one and run 'make env PYTHON=/path/to/python3.12'."
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)."

if [ -e .venv ] && [ ! -e "$half" ] && [ ! -e "$ready" ]; then
    fail ".venv is there but was not made by make: move it away, or delete it with 'make clean'."
elif [ -e "$half" ] && kill -0 "$(cat "$half")" 2>/dev/null; then
    fail "another make (process $(cat "$half")) is installing into .venv: wait for it, or end it."
elif [ -e "$half" ] || [ "$(cat "$ready" 2>/dev/null)" != "$here" ] || ! supported .venv/bin/python; then
    rm -rf .venv
fi
mkdir -p .venv
echo $$ >"$half"
rm -f "$ready"
[ -x .venv/bin/python ] || "$python" -m venv .venv

# uv is about ten times faster than pip, but it does not read pip's configuration: hand it the wheel folders.
# Where there is an NVIDIA GPU, a CPU wheel in such a folder must not win over the CUDA build. UV_TORCH_BACKEND (cu130, say) asks for
# a CUDA build where there is none: an image for a GPU is built so.
source_of_torch=(--torch-backend cpu)
wheels=()
size="about 1 minute on a fast line, 3.4 GB on disk"
if [ "${UV_TORCH_BACKEND:-cpu}" != cpu ] || { [ -z "${UV_TORCH_BACKEND:-}" ] && nvidia-smi >/dev/null 2>&1; }; then
    source_of_torch=(--torch-backend "${UV_TORCH_BACKEND:-auto}")
    size="some minutes, about 8 GB on disk with PyTorch's CUDA build"
else
    for folder in ${PIP_FIND_LINKS:-}; do
        [ -d "$folder" ] || continue # uv takes a missing folder for an error
        wheels+=(--find-links "$folder")
        if compgen -G "$folder/torch-[0-9]*.whl" >/dev/null; then source_of_torch=(); fi
    done
fi
echo "make env: installing into .venv with $(.venv/bin/python -V): $size"

with_uv() {
    .venv/bin/python -m pip install --quiet uv &&
        .venv/bin/uv pip install --python .venv/bin/python --compile-bytecode -c constraints-cpu.txt -e ".[dev]" \
            ${source_of_torch[@]+"${source_of_torch[@]}"} ${wheels[@]+"${wheels[@]}"}
}
with_pip() { # torch first: its pin keeps pip from trying newer CUDA builds, several GB each
    .venv/bin/python -m pip install --compile -c constraints-cpu.txt "$(grep '^torch==' constraints-cpu.txt)" &&
        .venv/bin/python -m pip install --compile -c constraints-cpu.txt -e ".[dev]"
}
if ! with_uv; then
    echo "make env: uv did not manage it (its message stands above); trying pip, which takes some minutes" >&2
    with_pip || fail "neither uv nor pip could install the packages (messages above): check the network or pip's index settings, then run make again."
fi

echo "$here" >"$ready"
rm "$half"
seconds=$(($(date +%s) - started))
echo "make env: .venv is ready after $((seconds / 60)) min $((seconds % 60)) s"
