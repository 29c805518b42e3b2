"""The layers of the code, proven from the import statements: each file imports only from below."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import placekern

PACKAGE = Path(placekern.__file__).parent
ROOT = Path(__file__).resolve().parents[1]

# Of each part, the parts that it may import besides itself. A new part is entered here on purpose.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "packing": set(),
    "memory_format": set(),
    "codebook": set(),
    "proofs": {"packing", "codebook"},
    "_native": {"_cpu", "_cuda", "codebook"},
    "device_packing": {"packing", "_native"},
    "weight_making": {"packing", "codebook", "proofs"},
    "weight": {"packing", "codebook", "device_packing", "proofs", "weight_making"},
    "reference": set(),
    "device": {"_native", "packing", "device_packing"},
    "device_backward": {"_native", "device"},
}
MAY_IMPORT["ops"] = MAY_IMPORT["weight"] | {"_native", "weight", "device", "device_backward"}
MAY_IMPORT["ops"] |= {"memory_format"}
MAY_IMPORT["module"] = MAY_IMPORT["weight"] | {"weight", "memory_format"}
MAY_IMPORT["nn"] = MAY_IMPORT["module"] | {"module", "ops"}
MAY_IMPORT["tables"] = set()
MAY_IMPORT["io"] = MAY_IMPORT["nn"] | {"nn", "reference", "tables", "_version"}
# io counts the bytes of a file; _native says at which level the kernels run.
MAY_IMPORT["compress"] = MAY_IMPORT["io"] | {"io", "_native"}
MAY_IMPORT["vpr"] = MAY_IMPORT["compress"] | {"compress"}
MAY_IMPORT["cli"] = MAY_IMPORT["vpr"] | {"vpr", "_native", "placekern"}
MAY_IMPORT["__main__"] = {"cli"}

FILES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
IDS = [str(p.relative_to(PACKAGE)) for p in FILES]


def module_name(path: Path) -> str:
    """placekern.io.file of .../placekern/io/file.py, placekern.io of its __init__.py."""
    parts = ["placekern", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES} | {"placekern._cpu", "placekern._cuda"}


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Modules of ours that a file imports, wherever in it, as the most precise names known."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return {name for name in found if name.split(".")[0] == "placekern"}


def imports_of(path: Path) -> set[str]:
    return imported(path.read_text(), module_name(path), path.name == "__init__.py")


def part(module: str) -> str:
    """placekern.io.file -> io; the package itself, which imports everything, is `placekern`."""
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from . import packing, proofs", "placekern.weight", {"packing", "proofs"}),
        ("from .packing import Layout", "placekern.weight", {"packing"}),
        ("from .. import _native", "placekern.ops.linear", {"_native"}),
        ("from ..io.streams import encoded_bytes", "placekern.compress.swap", {"io"}),
        ("from . import common", "placekern.ops.linear", {"ops"}),
        ("def f():\n    import placekern.cli", "placekern.nn", {"cli"}),
        ("import placekern as pk", "placekern.nn", {"placekern"}),
        ("from placekern import save", "placekern.vpr.evaluate", {"placekern"}),
        ("from placekern.io import save", "placekern.vpr.evaluate", {"io"}),
        ("from .. import save", "placekern.vpr.evaluate", {"placekern"}),
        ("import torch, numpy\nfrom scipy import sparse", "placekern.nn", set()),
    ],
)
def test_the_reader_of_imports(source: str, module: str, expected: set[str]) -> None:
    assert {part(name) for name in imported(source, module, False)} == expected


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_import_only_from_the_layers_below(path: Path) -> None:
    module = module_name(path)
    if module == "placekern":
        return  # gathers the public names of every part
    own = part(module)
    assert own in MAY_IMPORT, f"say in this test what {own} may import"
    wrong = {name for name in imports_of(path) if part(name) not in MAY_IMPORT[own] | {own}}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_no_part_is_below_one_that_it_imports() -> None:
    seen: list[str] = []
    for name, below in MAY_IMPORT.items():
        assert below <= {*seen, "_cpu", "_cuda", "placekern"}, name
        seen.append(name)


def test_files_do_not_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): imports_of(path) for path in FILES}
    for module in graph:
        # A package's own __init__ imports its files, and its files may come back for a sister.
        graph[module] = {name for name in graph[module] if not module.startswith(f"{name}.")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in sorted(graph.get(module, ())):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_reference_needs_torch_only() -> None:
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or ".").split(".")[0])
    assert roots == {"__future__", "torch"}


def code_of(path: Path) -> str:
    """The source without docstrings and comments."""
    return ast.unparse(_without_docstrings(ast.parse(path.read_text())))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                body[0] = ast.Pass()
    return tree


def test_only_native_takes_addresses_of_tensors() -> None:
    users = {str(p.relative_to(PACKAGE)) for p in FILES if "data_ptr(" in code_of(p)}
    assert users == {"_native/arrays.py", "_native/cpu.py", "_native/cuda.py"}


def test_the_loaders_of_the_core_are_used_by_native_alone() -> None:
    users = {
        module_name(path)
        for path in FILES
        if imports_of(path) & {"placekern._cpu", "placekern._cuda"}
    }
    assert users == {"placekern._native.cpu", "placekern._native.cuda"}


def test_nothing_is_pickled_or_evaluated() -> None:
    for path in FILES:
        code = code_of(path)
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|shelve)\b", code, re.M), path
        assert not re.search(r"(?<![.\w])(eval|exec)\(", code), path
        assert "allow_pickle=True" not in code, path
        assert "weights_only=False" not in code, path


# ---- the native core ----


SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())


def test_the_native_core_includes_no_torch_header() -> None:
    assert len(SOURCES) > 10
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2|THC?)/', re.I)
    for path in SOURCES:
        assert not pattern.search(path.read_text()), path
    assert pattern.search("#include <torch/extension.h>")
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "find_package(Torch" not in cmake
    setup = ast.parse((ROOT / "setup.py").read_text())
    for node in ast.walk(setup):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not any(name.split(".")[0] == "torch" for name in names)


def test_pybind11_stands_in_the_bindings_alone() -> None:
    users = {str(p.relative_to(ROOT)) for p in SOURCES if "pybind11" in p.read_text()}
    assert users == {"csrc/cpu/bindings.cpp", "csrc/cuda/bindings.cpp"}


def test_no_simd_flags_on_the_command_line() -> None:
    pattern = re.compile(
        r"-m(avx|sse|ssse|fma|bmi|f16c|popcnt|lzcnt|amx|arch|cpu|tune|fpu|native)|-xHost|/arch:"
        r"|-ffast-math|-Ofast"
    )
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile"):
        assert not pattern.search((ROOT / name).read_text()), name
    assert pattern.search("-O3 -mavx2")
    assert pattern.search("-march=native")


ISA_FILES = [p for p in SOURCES if "GCC target" in p.read_text()]


@pytest.mark.parametrize("path", ISA_FILES, ids=[p.name for p in ISA_FILES])
def test_isa_files_include_first_then_name_the_target_then_open_their_namespace(path: Path) -> None:
    # A header's function compiled for a target could be the copy that the linker keeps for all.
    lines = path.read_text().splitlines()
    target = next(i for i, line in enumerate(lines) if "GCC target" in line)
    namespace = next(i for i, line in enumerate(lines) if line.startswith("namespace placekern::"))
    headers = [i for i, line in enumerate(lines) if re.match(r"\s*#\s*include", line)]
    own = [i for i in headers if lines[i].rstrip().endswith('-inl.h"')]
    assert max(set(headers) - set(own)) < target < namespace
    assert all(i > namespace for i in own)
    assert path.stem == lines[namespace].split("::")[1].split()[0]


def test_there_are_isa_files() -> None:
    assert {"avx2.cpp", "avx512.cpp"} <= {p.name for p in ISA_FILES}
