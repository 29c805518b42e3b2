"""Benchmarks on a GPU; needs torch and numpy only. `python -m benchmarks.gpu --help`."""
