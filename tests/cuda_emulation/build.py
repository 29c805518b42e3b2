"""Compiles csrc/cuda for the host, on the emulated GPU of this folder, into build/emulated.

`python tests/cuda_emulation/build.py plain address thread` builds module `_cuda` in these variants:
as it is, with AddressSanitizer and UndefinedBehaviorSanitizer, with ThreadSanitizer. It takes host
pointers where the real module takes device pointers. environment() is what a python needs that
loads a variant. One surprise: the emulator's own files are compiled without sanitizers in every
variant, so that reports are about kernels only.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "emulated"
MACHINE = [
    HERE / f"{name}.cpp" for name in ("machine", "fiber", "matrix", "runtime", "shared_memory")
]

# name: (flags of kernels, flags of the emulator, flags of the linker, runtimes to load first)
VARIANTS = {
    "plain": (["-O2"], [], [], []),
    "address": (
        ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-DEMULATED_ADDRESS_SANITIZER"],
        ["-fsanitize=address,undefined"],
        ["libasan.so", "libubsan.so"],
    ),
    "thread": (
        ["-O1", "-fsanitize=thread"],
        ["-DEMULATED_THREAD_SANITIZER"],
        ["-fsanitize=thread"],
        ["libtsan.so"],
    ),
}
COMPILER = "g++"
COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"]
COMMON += ["-fno-strict-aliasing"]  # nvcc has no such rule for device code
WARNINGS = ["-Wall", "-Wno-sign-compare", "-Wno-unknown-pragmas", "-Wno-unused-function"]


def environment(variant: str) -> dict[str, str]:
    """What to set for a python that loads this variant: a sanitizer has to come first of all.

    Races in torch's own threads are none of ours, and what Python never frees is no leak.
    """
    runtimes = " ".join(
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in VARIANTS[variant][3]
    )
    if variant == "address":
        return {"LD_PRELOAD": runtimes, "ASAN_OPTIONS": "detect_leaks=0"}
    if variant == "thread":
        options = "ignore_noninstrumented_modules=1 halt_on_error=1 atexit_sleep_ms=0"
        return {"LD_PRELOAD": runtimes, "TSAN_OPTIONS": options}
    return {}


def build(variant: str) -> Path:
    """Brings module `_cuda` of a variant up to date and returns its path.

    Raises:
        ValueError: the variant is unknown.
        RuntimeError: the compiler refused a file; its words are the message.
    """
    import pybind11

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources += sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    return build_files(
        variant,
        f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}",
        sources,
        ['-DPLACEKERN_CUDA_ARCHS="emulated"', *(f"-isystem{path}" for path in includes)],
    )


def build_files(
    variant: str, name: str, sources: Sequence[Path], flags: Sequence[str] = ()
) -> Path:
    """Compiles `sources` and the emulator, and links build/emulated/<variant>/<name>.

    A name that ends in .so makes a library, any other a program. Files that are up to date stay; a
    process that builds the same variant waits.

    Raises:
        ValueError: the variant is unknown.
        RuntimeError: the compiler refused a file; its words are the message.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    kernel_flags, machine_flags, link_flags, _ = VARIANTS[variant]
    folder = OUTPUT / variant
    folder.mkdir(parents=True, exist_ok=True)
    base = [COMPILER, *COMMON, *WARNINGS, f"-I{HERE}"]
    steps = [([*base, "-O2", *machine_flags], source) for source in MACHINE]
    steps += [([*base, *kernel_flags, *flags], source) for source in sources]
    with _locked(folder / "lock"), ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda step: _compile(folder, *step), steps))
        target = folder / name
        link = [COMPILER, *link_flags, *(["-shared"] if name.endswith(".so") else [])]
        link += [str(path) for path in objects]
        _make(target, link, lambda: objects)
    return target


@functools.cache
def load(variant: str) -> ModuleType:
    """Builds module `_cuda` of a variant and imports it, once; beside any other of that name.

    Raises:
        RuntimeError: it does not compile, or the sanitizer's runtime is not loaded in this process.
    """
    symbol = {"address": "__asan_init", "thread": "__tsan_init"}.get(variant)
    if symbol is not None and not _has_symbol(symbol):
        words = " ".join(f"{name}='{value}'" for name, value in environment(variant).items())
        raise RuntimeError(
            f"the {variant} variant needs its sanitizer from the start of the process; "
            f"run python with {words}"
        )
    path = build(variant)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _has_symbol(name: str) -> bool:
    import ctypes

    return hasattr(ctypes.CDLL(None), name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process at the latest."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path, command: list[str], source: Path) -> Path:
    """One object file, unless the command and all files that it was made from are the same."""
    target = folder / f"{source.parent.name}.{source.name}.o"
    dependencies = target.with_suffix(".d")
    command = [*command, "-x", "c++", "-c", str(source), "-MMD", "-MF", str(dependencies)]

    def read_dependencies() -> list[Path]:
        if not dependencies.exists():
            return [source]
        words = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1]
        return [Path(w.replace("\\ ", " ")) for w in re.findall(r"(?:\\ |\S)+", words)]

    _make(target, command, read_dependencies)
    return target


def _make(target: Path, command: list[str], made_from: Callable[[], list[Path]]) -> None:
    """Runs a compiler that writes `target`, which others see only when it is whole.

    Nothing is done where a stamp beside it says that command and files are those of the last time.
    """
    stamp = target.with_name(f"{target.name}.stamp")
    if target.exists() and stamp.exists() and stamp.read_text() == _stamp(command, made_from()):
        return
    stamp.unlink(missing_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    started = time.time_ns()
    done = subprocess.run(
        [*command, "-o", str(unfinished)],
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    os.replace(unfinished, target)
    if all(path.stat().st_mtime_ns <= started for path in made_from()):  # none was edited meanwhile
        stamp.write_text(_stamp(command, made_from()))


def _stamp(command: list[str], made_from: list[Path]) -> str:
    """What a file was made from; changes when a file does, whether it is newer or not."""
    words = list(command)
    for path in made_from:
        state = path.stat() if path.exists() else None
        words.append(f"{path} {state.st_mtime_ns} {state.st_size}" if state else f"{path} is gone")
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VARIANTS:
        print(build(wanted))
