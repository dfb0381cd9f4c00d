"""Freed memory of a training stays with its process."""

import os
import subprocess
import sys

import pytest

from homelib.run import heap

CODE = """
import sys
from pathlib import Path
from homelib.run.heap import keep_freed_memory
made = keep_freed_memory() if sys.argv[1] == "kept" else []
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 64 * 2**20
before = pages()
block = libc.malloc(size)
ctypes.memset(block, 1, size)
libc.free(block)
print(len(made), (pages() - before) * 4096 > size / 2)
"""


OWN = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize(("how", "own", "expected"), [("kept", {}, "2 True"), ("left", {}, "0 False"), ("kept", OWN, "1 False")])
def test_freed_memory_is_kept_unless_the_caller_has_said_otherwise(how, own, expected):
    clean = {name: value for name, value in os.environ.items() if name not in heap.SETTINGS}
    done = subprocess.run([sys.executable, "-c", CODE, how], env=clean | own, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_a_training_on_a_cpu_keeps_it(monkeypatch):
    from homelib.config import preset
    from homelib.run import begin

    asked = []
    monkeypatch.setattr(begin, "keep_freed_memory", lambda: asked.append(True))
    begin.launched(preset("smoke").training.model_copy(update={"accelerator": "cpu"}))
    assert asked == [True]
