# homelib in a container: what `make env` installs, in JupyterLab.
#
#   docker build -t homelib .                                               # for a CPU
#   docker build -t homelib:cuda --build-arg TORCH=cu130 .                  # for an NVIDIA GPU, with PyTorch's build for CUDA 13.0
#   docker run --rm -p 127.0.0.1:8888:8888 -v homelib:/home/reader/kept homelib      # prints the address with its token; add --gpus all
#   docker run --rm -v homelib:/home/reader/kept homelib make demo          # or make test, home doctor: any command
#
# Runs and fetched scans are kept in the volume. A training with training.workers wants `--shm-size 2g` besides.
# A folder of yours in place of the volume (-v "$PWD/kept:/home/reader/kept") must be writable for user 1000, or build with --build-arg UID="$(id -u)".

ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# TORCH: cpu, or one of PyTorch's CUDA builds by uv's name (cu126, cu128, cu130). The driver comes from the host, by the NVIDIA container toolkit.
ARG TORCH=cpu
ARG UID=1000

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# make for the workbook's commands; a C compiler for Triton, which builds the stub that starts a kernel on the GPU
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends make \
    && if [ "$TORCH" != cpu ]; then apt-get install -y --no-install-recommends gcc libc6-dev; fi \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid "$UID" reader \
    && install -d -o reader -g reader /home/reader/homelib /home/reader/kept
USER $UID
WORKDIR /home/reader/homelib

# First only what an installation depends on, so that a change of the code does not install anew.
COPY --chown=reader:reader pyproject.toml constraints-cpu.txt Makefile README.md LICENSE ./
COPY --chown=reader:reader scripts/ scripts/
RUN UV_TORCH_BACKEND="$TORCH" UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 make env

# What was installed belongs to the files above, whatever their dates in this clone: nothing is installed again in a container.
COPY --chown=reader:reader . .
RUN touch .venv/.homelib-ready

ENV PATH=/home/reader/homelib/.venv/bin:$PATH \
    HOMELIB_RUNS=/home/reader/kept/runs \
    HOMELIB_CACHE=/home/reader/kept/cache
VOLUME /home/reader/kept
EXPOSE 8888

# JupyterLab makes a token and prints it; -e JUPYTER_TOKEN=... sets one.
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--notebook-dir=notebooks"]

# /api needs no token. Of a container that runs another command it says nothing.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8888/api', timeout=5)"]
