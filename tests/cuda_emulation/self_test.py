"""Drives self_test.cu: as a library in this process, or as a program under a sanitizer."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from . import build

SELF_TEST = build.HERE / "self_test.cu"
INVALID_VALUE, INVALID_CONFIGURATION, MISALIGNED, LAUNCH_FAILURE = 1, 9, 716, 719


class Launch(ctypes.Structure):
    """Sizes of a launch; bytes of shared memory, and those that the kernel was allowed before."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("allowed", ctypes.c_uint),
    )


class Emulation:
    """The kernels of the self-test as a library, without a sanitizer."""

    def __init__(self) -> None:
        path = build.build_files("plain", "self_test.so", [SELF_TEST])
        self.library = ctypes.CDLL(str(path))
        self.library.error_text.restype = ctypes.c_char_p

    def launch(
        self,
        kernel: str,
        given: NDArray | None,
        out: NDArray,
        *,
        variant: int = 0,
        grid: Sequence[int] = (1,),
        block: Sequence[int] = (32,),
        shared: int = 0,
        allowed: int = 0,
    ) -> int:
        """Runs a kernel and returns its status, a cudaError_t."""
        three = [tuple([*sizes, 1, 1][:3]) for sizes in (grid, block)]
        launch = Launch(*three, shared, allowed)
        if given is not None:
            assert given.flags.c_contiguous
        status = self.library.run(
            kernel.encode(),
            ctypes.byref(launch),
            None if given is None else ctypes.c_void_p(given.ctypes.data),
            ctypes.c_void_p(out.ctypes.data),
            variant,
        )
        assert status >= 0, f"no kernel {kernel}"
        return status

    def run(self, kernel: str, given: NDArray | None, out: NDArray, **sizes: object) -> NDArray:
        """Runs a kernel that must succeed and returns `out`."""
        status = self.launch(kernel, given, out, **sizes)
        assert status == 0, self.text(status)
        return out

    def text(self, status: int) -> str:
        """What cudaGetErrorString says."""
        return self.library.error_text(status).decode()


def fragments(d: NDArray, a: NDArray, b: NDArray) -> NDArray[np.uint32]:
    """Words of each lane [32, 10], by the figures of the PTX ISA: a [16, k], b [k, 8] as bits."""
    lanes = np.zeros((32, 10), np.uint32)
    wide = a.shape[1] == 8  # TF32: an element a word
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            row = group if i < 2 else group + 8
            lanes[lane, i] = d[row, thread * 2 + (i & 1)].view(np.uint32)
        for i in range(4 if wide else 8):
            if wide:
                row = group if i in (0, 2) else group + 8
                lanes[lane, 4 + i] = a[row, thread if i < 2 else thread + 4]
            else:
                row = group if i < 2 or 4 <= i < 6 else group + 8
                column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
                lanes[lane, 4 + i // 2] |= np.uint32(a[row, column]) << np.uint32(16 * (i & 1))
        for i in range(2 if wide else 4):
            if wide:
                lanes[lane, 8 + i] = b[thread + 4 * i, group]
            else:
                row = thread * 2 + (i & 1) + (0 if i < 2 else 8)
                lanes[lane, 8 + i // 2] |= np.uint32(b[row, group]) << np.uint32(16 * (i & 1))
    return lanes


class Program:
    """The self-test as a program of its own, in a variant with a sanitizer."""

    def __init__(self, variant: str) -> None:
        self.path = build.build_files(variant, "self_test", [SELF_TEST])

    def run(
        self,
        kernel: str,
        variant: int,
        threads: int = 64,
        blocks: int = 4,
        order: str = "ascending",
    ) -> subprocess.CompletedProcess[str]:
        """Launches a kernel twice; the return code is 0 where nothing was reported."""
        settings = {
            "PLACEKERN_EMULATED_ORDER": order,
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "exitcode=66 atexit_sleep_ms=0",
        }
        done = subprocess.run(
            [str(self.path), kernel, str(variant), str(threads), str(blocks)],
            capture_output=True,
            text=True,
            env=os.environ | settings,
            timeout=120,
        )
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer does not run with this kernel's address randomization")
        return done

    def check_silent(self, *launch: object, **settings: object) -> None:
        """Launches as in `run`; nothing may be reported."""
        done = self.run(*launch, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == "no error\n" * 2
        assert done.stderr == ""

    def check_reports(self, report: str, *launch: object, **settings: object) -> None:
        """Launches as in `run`; the sanitizer must say these words and name a line."""
        done = self.run(*launch, **settings)
        assert done.returncode != 0, done.stdout
        assert report in done.stderr, done.stderr
        assert "self_test.cu:" in done.stderr, done.stderr
