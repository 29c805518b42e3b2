"""Runs the tests of the CUDA ops with the kernels under a sanitizer.

`python tests/cuda_emulation/sanitize.py address thread`, and `barriers` for the proof that each
barrier of the kernels is needed. The surprise: a sanitizer has to be loaded before Python, so
pytest is started anew with it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import build

OPS = [
    f"tests/test_cuda_{op}.py"
    for op in ("linear", "conv2d", "backward", "codebook_groups", "kmeans_assign")
]


def main(kinds: list[str]) -> int:
    """Exit status of the last run that failed, 0 when none did."""
    status = 0
    for kind in kinds:
        print(f"CUDA kernels, emulated: {kind}", flush=True)
        if kind == "barriers":
            what, environment = ["tests/test_cuda_barriers.py"], {"PLACEKERN_EMULATION": "thread"}
        else:
            build.build(kind)
            what = [*OPS, "-k", "emulated", "-p", "no:cacheprovider"]
            environment = build.environment(kind) | {"PLACEKERN_EMULATION": kind}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *what],
            cwd=build.ROOT,
            env=os.environ | environment | {"PYTHONPATH": str(build.ROOT)},
        )
        status = done.returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["address", "thread", "barriers"]))
