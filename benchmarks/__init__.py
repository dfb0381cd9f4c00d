"""Speed and memory of homelib beside named peers, always in the same run; see `python -m benchmarks.cpu` and `python -m benchmarks.gpu`."""
