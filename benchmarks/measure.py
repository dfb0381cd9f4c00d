"""Time and memory of one thing: medians, in a process of its own, so that no measurement sees another's memory or caches."""

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numba", "monai", "blosc2", "nibabel", "mambapy", "transformers", "mamba-ssm", "causal-conv1d")
RESULTS = Path(__file__).parent / "results"
PATIENCE_SECONDS = 300
LIBC = ctypes.CDLL(None)


@dataclass
class Measured:
    """What one process found: medians over `runs` after one run that does not count; and the most memory that one more run held at a time,
    beyond what was there before. On a CPU that is the resident memory, with an allocator that hands large blocks back when they are freed
    (glibc otherwise keeps some, as it happens): of all that is measured alike."""

    seconds: float
    fastest: float
    slowest: float
    runs: int
    peak_mib: float
    detail: dict


def measure(run: Callable[[], dict | None], *, runs: int = 5, warm_up: int = 1, device: str = "cpu") -> Measured:
    """Time `run`, which may return details to keep (of its last call)."""
    return measure_in_turn({"": run}, runs=runs, warm_up=warm_up, device=device)[""]


def measure_in_turn(ways: Mapping[str, Callable[[], dict | None]], *, runs: int = 5, warm_up: int = 1, device: str = "cpu") -> dict[str, Measured]:
    """Time several things by name, one after the other and round again, so that the machine's moods are the same for all."""
    times, detail, peak = {name: [] for name in ways}, {}, {}
    for run in ways.values():
        for _ in range(warm_up):
            run()
    for _ in range(runs):
        for name, run in ways.items():
            synchronize(device)
            start = time.perf_counter()
            detail[name] = run() or {}
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    if device == "cpu":
        hand_back_freed_memory()
    for name, run in ways.items():
        reset_peak(device)
        before = memory_now(device)
        run()
        peak[name] = max(0.0, (memory_peak(device) - before) / 2**20)
    return {name: Measured(statistics.median(t), min(t), max(t), runs, peak[name], detail[name]) for name, t in times.items()}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def hand_back_freed_memory() -> None:
    """From now on, for blocks over 1 MiB (mallopt(3), M_MMAP_THRESHOLD is -3)."""
    LIBC.mallopt(-3, 2**20)


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cpu":
        LIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    else:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_now(device: str) -> int:
    return _status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated(device)


def memory_peak(device: str) -> int:
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _status(field: str, process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field}: not in /proc/{process}/status; memory on a CPU is measured on Linux only.")


@contextmanager
def workers_peak(every_seconds: float = 0.25) -> Iterator[dict]:
    """{"worker_mib": the most resident memory that any one process below this one has held}, when it ends. Linux keeps the mark of each process as
    long as it lives, so that looking now and then suffices for workers that do one thing after the other."""
    told, done = {"worker_mib": 0.0}, threading.Event()

    def look() -> None:
        while not done.wait(every_seconds):
            for process in _below(os.getpid()):
                with suppress(OSError):  # it has ended
                    told["worker_mib"] = max(told["worker_mib"], _status("VmHWM", process) / 2**20)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield told
    finally:
        done.set()
        watch.join()


def _below(process: int) -> set[int]:
    """Children of a process, theirs, and so on."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found, size = {process}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {process}


def in_process(case: dict, *, threads: int, patience_seconds: float = PATIENCE_SECONDS) -> dict:
    """Run `benchmarks.cases` with a case in a new process: what it measured, or {"skipped": reason}; the same by name for cases in turn."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads), "TRITON_INTERPRET": "0"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # MONAI would be compiled anew in every process
    command = [sys.executable, "-m", "benchmarks.cases", json.dumps(case)]
    try:
        done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=patience_seconds)
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {patience_seconds:.0f} s"}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no word"]
        return {"skipped": f"exit status {done.returncode}: {last[0]}"}
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """What the numbers were measured on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cpu = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "cpu": (cpu or [platform.machine()])[0],
        "cores": os.cpu_count(),
        "gpus": gpus,
        "python": platform.python_version(),
        "versions": versions,
    }


def save(name: str, results: dict, *, folder: Path | None = None) -> Path:
    """Into benchmarks/results, or where notebooks of a wheel find it too, homelib/study/results."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | results, indent=1) + "\n")
    return path


def table(title: str, rows: list[dict], columns: list[str]) -> None:
    """Print rows as text columns; a skipped one with its reason."""
    print(f"\n{title}")
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows if "skipped" not in row]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))))
    for row in rows:
        if "skipped" in row:
            print(f"  {row['what']}: skipped, {row['skipped']}")
    sys.stdout.flush()


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(size), by least squares."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope
