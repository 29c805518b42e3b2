"""The build and what it produced: ISA levels, refusals in one sentence, and no stray instructions.

`setup.py` runs on a copy of the few files that it reads, with a `cmake` on the PATH that only
leaves a mark: a build that should have been refused is seen, and nothing is compiled.
"""

from __future__ import annotations

import importlib.machinery
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import placekern as pk
from placekern import _native

ROOT = Path(__file__).resolve().parents[1]


# ---- PLACEKERN_ISA ----


def import_with(isa: str | None, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code after `import placekern as pk` in a new process with PLACEKERN_ISA set."""
    environment = {k: v for k, v in os.environ.items() if k != "PLACEKERN_ISA"}
    if isa is not None:
        environment["PLACEKERN_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", f"{ONLY_THE_COPY}import placekern as pk\n{code}"],
        capture_output=True,
        text=True,
        cwd=Path(pk.__file__).parents[1],
        env=environment,
        timeout=120,
    )


RUN = """
import torch
layer, x = pk.QuantSparseLinear(300, 40, bits=5), torch.randn(7, 300)
error = (layer(x) - layer.to_dense()(x)).abs().max()
assert error < 1e-4, error
print(pk.get_isa())
"""


@pytest.mark.parametrize("isa", pk.available_isas())
def test_a_level_of_the_environment_is_used_from_the_import_on(isa: str) -> None:
    child = import_with(isa, RUN)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == isa


def test_an_empty_level_means_the_highest() -> None:
    child = import_with("", "print(pk.get_isa())")
    assert child.stdout.strip() == pk.available_isas()[-1], child.stderr


LEVELS = ["scalar", "avx2", "avx512", "amx", "neon"]


@pytest.mark.parametrize("isa", ["mmx", *[i for i in LEVELS if i not in pk.available_isas()][:1]])
def test_a_level_that_cannot_be_had_is_an_error_at_import(isa: str) -> None:
    child = import_with(isa, "print('imported')")
    assert child.returncode == 1
    assert "imported" not in child.stdout
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: PLACEKERN_ISA={isa}")
    assert "this processor has" in last
    assert last.endswith(", ".join(pk.available_isas()))


def test_a_level_can_be_changed_and_a_wrong_one_changes_nothing() -> None:
    before = pk.get_isa()
    try:
        for isa in pk.available_isas():
            pk.set_isa(isa)
            assert pk.get_isa() == isa
            for wrong in ("AVX2", "", "avx2 ", "sse"):
                with pytest.raises(ValueError, match="this processor has"):
                    pk.set_isa(wrong)
            assert pk.get_isa() == isa
    finally:
        pk.set_isa(before)


# ---- setup.py ----


USUAL_PLACE = "/usr/local/cuda"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that `setup.py build_ext` reads."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "placekern/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "placekern" / "__init__.py").touch()
    script = (tmp_path / "setup.py").read_text()
    assert USUAL_PLACE in script  # looked into without a PATH: moved to where nothing is
    (tmp_path / "setup.py").write_text(script.replace(USUAL_PLACE, str(tmp_path / "nowhere")))
    return tmp_path


def tool(folder: Path, name: str, script: str = "exit 0") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def build(checkout: Path, tools: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs build_ext with only these programs on the PATH, and cmake, which leaves a mark."""
    programs = checkout / "programs"
    tool(programs, "cmake", f'echo "$@" >> {checkout}/cmake-was-called')
    for name in tools:
        program, _, release = name.partition(" ")
        version = f"echo Cuda compilation tools, release {release or '13.0'}, V1"
        tool(programs, program, version if program == "nvcc" else "exit 0")
    drop = ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "PLACEKERN_CUDA", "PLACEKERN_CUDA_ARCHS")
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        capture_output=True,
        text=True,
        cwd=checkout,
        env=environment | {"PATH": str(programs)} | settings,
        timeout=120,
    )


def check_refused(checkout: Path, child: subprocess.CompletedProcess[str], *words: str) -> None:
    """One sentence, the last that is said; no traceback, nothing configured."""
    assert child.returncode == 1, child.stdout + child.stderr
    assert "Traceback" not in child.stderr
    sentence = child.stderr.strip().splitlines()[-1]
    assert sentence.startswith("placekern: ")
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence
    assert not (checkout / "cmake-was-called").exists()
    assert not (checkout / "build").exists()


def test_setup_refuses_another_word_for_cuda(checkout: Path) -> None:
    for word in ("bogus", "1", "yes please"):
        child = build(checkout, ["c++"], PLACEKERN_CUDA=word)
        check_refused(checkout, child, f"PLACEKERN_CUDA={word}", "auto, on, off")


def test_setup_refuses_cuda_without_a_compiler_for_it(checkout: Path) -> None:
    child = build(checkout, ["c++"], PLACEKERN_CUDA="on")
    check_refused(checkout, child, "nvcc was not found", "CUDA_HOME", "PLACEKERN_CUDA=off")
    # A CUDA_HOME that has none is no help.
    child = build(checkout, ["c++"], PLACEKERN_CUDA="on", CUDA_HOME=str(checkout))
    check_refused(checkout, child, "nvcc was not found")


@pytest.mark.parametrize("settings", [{}, {"CXX": "no-such-compiler"}, {"CXX": ""}])
def test_setup_refuses_to_start_without_a_compiler(
    settings: dict[str, str], checkout: Path
) -> None:
    child = build(checkout, [], **settings)
    check_refused(checkout, child, "no C++ compiler found", "apt install g++", "CXX")


@pytest.mark.parametrize(
    ("tools", "settings", "cuda"),
    [
        (["c++"], {"PLACEKERN_CUDA": "off"}, "OFF"),
        (["g++", "nvcc"], {"PLACEKERN_CUDA": "OFF"}, "OFF"),
        (["clang++", "nvcc"], {}, "ON"),
        (["c++", "nvcc"], {"PLACEKERN_CUDA": "on", "PLACEKERN_CUDA_ARCHS": "90"}, "ON"),
        (["c++", "nvcc 11.5"], {}, "OFF"),  # too old for the GPUs we build for: left alone
        (["my-compiler"], {"CXX": "my-compiler -O2", "PLACEKERN_CUDA": "off"}, "OFF"),
    ],
)
def test_setup_configures_what_was_asked_for(
    tools: list[str], settings: dict[str, str], cuda: str, checkout: Path
) -> None:
    child = build(checkout, tools, **settings)
    assert child.returncode == 0, child.stderr
    configure, compile_ = (checkout / "cmake-was-called").read_text().splitlines()
    assert f"-DPLACEKERN_CUDA={cuda}" in configure
    assert "--build" in compile_
    if cuda == "ON":
        assert f"-DCMAKE_CUDA_COMPILER={checkout}/programs/nvcc" in configure
        archs = settings.get("PLACEKERN_CUDA_ARCHS", "75;80;86;89;90")
        assert f"-DCMAKE_CUDA_ARCHITECTURES={archs}" in configure


# ---- what was built ----


CPU = Path(_native.cpu._cpu.__file__)
CUDA = next(
    (
        path
        for suffix in importlib.machinery.EXTENSION_SUFFIXES
        if (path := CPU.with_name(f"_cuda{suffix}")).exists()
    ),
    None,
)

# Instructions of a level above the baseline of x86-64: VEX and EVEX encoded ones begin with a v,
# mask registers with a k; then BMI and BMI2. tzcnt is not here: it runs as bsf everywhere.
ABOVE_BASELINE = re.compile(
    r"\t(v(?!err|erw|mcall)[a-z0-9]+|k(mov|and|or|not|xor|xnor|shift|add|test|unpck)[a-z]*"
    r"|andn|bextr|bls[ir]|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|popcnt|lzcnt)\b"
)


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """Disassembly of _cpu, a list of instructions a function."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this is about x86-64")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not here")
    dump = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(CPU)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in dump.splitlines():
        if match := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            lines = found.setdefault(match[1], [])
        elif "\t" in line:
            lines.append(line)
    if not any("placekern::scalar::" in name for name in found):
        pytest.skip("_cpu was stripped of its symbols")
    return found


def offenders(functions: dict[str, list[str]], chosen: Callable[[str], bool]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, lines in functions.items():
        if chosen(name):
            counts[name] += sum(bool(ABOVE_BASELINE.search(line)) for line in lines)
    return +counts


def test_the_portable_level_has_portable_instructions_only(
    functions: dict[str, list[str]],
) -> None:
    scalar = [name for name in functions if "placekern::scalar::" in name]
    assert len(scalar) > 20
    assert not offenders(functions, lambda name: "placekern::scalar::" in name)
    registers = re.compile(r"%[yz]mm\d|%k[1-7]\b")
    assert not any(registers.search(line) for name in scalar for line in functions[name])


def test_nothing_outside_the_levels_needs_more_than_the_baseline(
    functions: dict[str, list[str]],
) -> None:
    # Dispatch, bindings and every inline function of a header: what runs before a level is chosen.
    assert not offenders(functions, lambda name: not re.search(r"placekern::avx\w*::", name))
    # The check does see such instructions where they belong.
    assert len(offenders(functions, lambda name: "placekern::avx2::" in name)) > 10
    assert len(offenders(functions, lambda name: "placekern::avx512::" in name)) > 10


def test_no_level_runs_code_when_the_library_is_loaded(functions: dict[str, list[str]]) -> None:
    # The initialiser of a global in avx2.cpp is compiled for AVX2 and runs on every processor.
    initialisers = [name for name in functions if name.startswith("_GLOBAL__sub_I_")]
    assert not [name for name in initialisers if re.search("avx|amx|neon", name)]


def libraries(path: Path) -> list[str]:
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not here")
    listing = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listing.stdout.splitlines() if line.strip()]


def test_the_cpu_module_links_openmp_and_no_torch() -> None:
    names = libraries(CPU)
    assert any(re.match(r"lib(gomp|omp|iomp5)\.so", name) for name in names)
    assert not any(re.search("torch|c10|cuda|python", name) for name in names)


needs_cuda_module = pytest.mark.skipif(CUDA is None, reason="_cuda was not built")


@needs_cuda_module
def test_the_cuda_module_imports_without_a_gpu() -> None:
    child = import_with(
        None,
        "from placekern import _cuda, _native\n"
        "print(_cuda.device_count(), _native.cuda_devices(), _native.cuda_architectures())",
    )
    assert child.returncode == 0, child.stderr
    count, same, *architectures = child.stdout.split()
    assert count == same
    assert int(count) >= 0
    assert all(arch.isdigit() for arch in architectures)


@needs_cuda_module
def test_the_cuda_module_needs_neither_driver_nor_runtime_library() -> None:
    names = libraries(CUDA)
    assert not any(re.search(r"libcuda|libcudart|libnv|torch|c10", name) for name in names)


# An editable install would find what the copy lacks in the place that it was installed from.
ONLY_THE_COPY = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def import_a_copy(folder: Path, without: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code after importing a copy of the package that lacks the files `without`."""
    ignore = shutil.ignore_patterns(without, "__pycache__")
    shutil.copytree(Path(pk.__file__).parent, folder / "placekern", ignore=ignore)
    return subprocess.run(
        [sys.executable, "-c", f"{ONLY_THE_COPY}import placekern as pk\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        timeout=120,
    )


def test_without_the_cuda_module_everything_else_works(tmp_path: Path) -> None:
    code = (
        "from placekern import _native\n"
        "assert _native.cuda_devices() == 0 and _native.cuda_architectures() is None\n"
    )
    child = import_a_copy(tmp_path, "_cuda*", code + RUN)
    assert child.stdout.strip() in pk.available_isas(), child.stderr


def test_without_the_cpu_module_an_error_says_how_to_build_it(tmp_path: Path) -> None:
    child = import_a_copy(tmp_path, "_c*.so", "")
    assert child.returncode == 1
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: placekern's native core could not be loaded")
    assert "pip install ." in last
