"""Building for the emulated GPU, and what the sanitizers report of kernels that run on it.

They see cuda_emulation/self_test.cu as a program: no Python and no torch is in their way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cuda_emulation import build
from cuda_emulation.self_test import Program

# ---- sanitizers ----


@pytest.fixture(scope="module")
def address() -> Program:
    return Program("address")


@pytest.fixture(scope="module")
def thread() -> Program:
    return Program("thread")


@pytest.mark.parametrize(
    ("variant", "report"),
    [
        (1, "AddressSanitizer: use-after-poison"),  # one past the launch's shared memory
        (2, "AddressSanitizer: use-after-poison"),  # one before
        (3, "runtime error: store to misaligned address"),
        (4, "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_overruns_are_reported(variant: int, report: str, address: Program) -> None:
    address.check_silent("bounds", 0)
    address.check_reports(report, "bounds", variant)


def test_correct_kernels_are_silent_under_address_sanitizer(address: Program) -> None:
    for kernel in ("block_exchange", "warp_exchange", "grid_exchange", "last_block"):
        for order in ("ascending", "descending", "1"):
            address.check_silent(kernel, 0, order=order)
    # A launch that ends early leaves no trace on the stacks of its fibers.
    done = address.run("misuse", 0)
    assert done.stderr == ""
    assert "deadlock" in done.stdout


RACE = "ThreadSanitizer: data race"


@pytest.mark.parametrize("order", ["ascending", "descending", "1"])
@pytest.mark.parametrize(
    ("kernel", "racing"),
    [
        ("block_exchange", [1, 2]),  # without __syncthreads, and between two
        ("warp_exchange", [1, 2]),  # without __syncwarp, and with a shuffle instead of it
        ("grid_exchange", [1]),  # two blocks write to one place
        ("last_block", [1, 2]),  # without the fence of the writer, without the reader's
    ],
)
def test_races_are_reported_and_barriers_end_them(
    kernel: str, racing: Sequence[int], order: str, thread: Program
) -> None:
    thread.check_silent(kernel, 0, order=order)
    for variant in racing:
        thread.check_reports(RACE, kernel, variant, order=order)


def test_atomics_do_not_race(thread: Program) -> None:
    thread.check_silent("grid_exchange", 2)


def test_a_launch_that_fails_races_with_nothing_after_it(thread: Program) -> None:
    done = thread.run("misuse", 0)
    assert done.stderr == ""
    assert done.stdout.count("deadlock") == 2


@pytest.mark.parametrize("blocks", [2, 3, 7])
def test_a_race_between_any_number_of_blocks_is_reported(blocks: int, thread: Program) -> None:
    thread.check_reports(RACE, "grid_exchange", 1, blocks=blocks)


# ---- building ----


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that build_files compiles alone, into a folder of the test."""
    monkeypatch.setattr(build, "OUTPUT", tmp_path / "out")
    monkeypatch.setattr(build, "MACHINE", [])
    (tmp_path / "number.h").write_text("#define NUMBER 1\n")
    source = tmp_path / "kernel.cu"
    source.write_text('#include "number.h"\n#include <cuda_fp16.h>\nint number = NUMBER;\n')
    return source


def test_files_are_compiled_again_when_one_of_them_changes(kernel: Path) -> None:
    def build_time() -> int:
        return build.build_files("plain", "kernel.so", [kernel]).stat().st_mtime_ns

    first = build_time()
    assert build_time() == first
    header = kernel.with_name("number.h")
    header.write_text("#define NUMBER 2\n")
    os.utime(header, (0, 0))  # older than all: a copy of an earlier state
    second = build_time()
    assert second > first
    assert build_time() == second


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("int f() { return nothing; }", "'nothing' was not declared"),
        ("void f() { __shared__ int own[4]; own[0] = 1; }", "section attribute cannot be"),
        ("__half f(__half x) { return x * x; }", "use of deleted function"),
    ],
)
def test_a_source_that_does_not_compile_is_an_error(line: str, words: str, kernel: Path) -> None:
    with kernel.open("a") as file:
        file.write(line)
    with pytest.raises(RuntimeError) as error:
        build.build_files("plain", "kernel.so", [kernel])
    assert words in str(error.value)
    assert f"{kernel}:4:" in str(error.value)


def test_processes_that_build_the_same_take_turns(kernel: Path) -> None:
    code = (
        "from pathlib import Path; from cuda_emulation import build\n"
        f"build.MACHINE, build.OUTPUT = [], Path({str(build.OUTPUT)!r})\n"
        f"path = build.build_files('plain', 'kernel.so', [Path({str(kernel)!r})])\n"
        "print(path.stat().st_mtime_ns)"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=build.HERE.parent, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert len({child.communicate(timeout=120)[0] for child in children}) == 1
    assert [child.returncode for child in children] == [0, 0, 0]


def test_a_variant_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one of plain, address, thread"):
        build.build("memory")
    missing = [v for v in ("address", "thread") if v != os.environ.get("PLACEKERN_EMULATION")]
    for variant in missing:
        with pytest.raises(RuntimeError, match=r"run python with LD_PRELOAD='.*lib[at]san"):
            build.load(variant)
