"""Triton's kernels compile to machine code for a GPU, which needs none: what its interpreter lets pass, the compiler may not.

The scan's with everything that is optional, from right to left, and with nothing of it, from left to right; those of instance norm for either layout.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPILE = """
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

vars(triton).pop("knobs", None)  # not in Triton before 3.4
from homelib.network import instance_norm_gpu
from homelib.network.scan import triton_gpu, triton_kernels

assert triton_gpu.DEVICES == instance_norm_gpu.DEVICES == ("cuda",)
on = sys.argv[1] == "with"
constants = {
    "REVERSE": on, "HAS_D": on, "HAS_Z": on, "HAS_BIAS": on, "SOFTPLUS": on, "T": triton_gpu.TOKENS, "BLOCK": triton_gpu.CHANNELS,
    "STATES": 16, "SCRATCH": 4096, "ROWS": triton_gpu.CHAIN[0], "COLUMNS": triton_gpu.CHAIN[1],
    "LAST": on, "BLOCK_C": 64 if on else 1, "BLOCK_V": 32 if on else 2048, "SPLITS": 1024 if on else 1,
}
whole = re.compile(r"[a-zA-Z]+_[bdl]|tokens|channels|state|chunks|blocks|items|batch|voxels|splits?")


def kind(name):
    if name in constants:
        return "constexpr"
    if whole.fullmatch(name):
        return "i32"
    return "fp32" if name == "eps" else "*bf16" if name in ("u", "y", "du", "x", "dx") else "*fp32"


for told in sys.argv[2:]:
    module, warps = (triton_kernels, triton_gpu.WARPS) if hasattr(triton_kernels, told) else (instance_norm_gpu, instance_norm_gpu.WARPS)
    kernel = getattr(module, told)
    signature = {name: kind(name) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={name: constants[name] for name in kernel.arg_names if name in constants})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(told, len(made.asm["cubin"]))
"""
SCAN = ("_ends", "_chain_chunks", "_apply", "_apply_backward")
INSTANCE_NORM = ("_moments", "_merge", "_normalise", "_products", "_gradient")


@pytest.mark.parametrize(
    ("kernels", "optional"),
    [(SCAN, "with"), pytest.param(SCAN, "without", marks=pytest.mark.long), (INSTANCE_NORM, "with"), (INSTANCE_NORM, "without")],
    ids=["scan, with", "scan, without", "instance norm, channels last", "instance norm, contiguous"],
)
def test_the_kernels_compile_for_compute_capability_9(kernels, optional, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE, optional, *kernels], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    made = dict(line.split() for line in done.stdout.splitlines())
    assert tuple(made) == kernels
    assert all(int(size) > 1000 for size in made.values())
