"""Builds the native core with CMake and Ninja; neither torch nor a GPU is needed to build.

Environment: PLACEKERN_CUDA=auto|on|off says whether `placekern._cuda` is built ("auto": when nvcc
is found), PLACEKERN_CUDA_ARCHS which GPUs it serves, as CMake writes them ("75;80;86;89;90").
PLACEKERN_WERROR=on makes warnings errors, as `make` does: compilers of users know others than ours.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "75;80;86;89;90"


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, $CUDA_HOME, the PATH, or the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cuda_version(nvcc: str) -> tuple[int, int]:
    """(major, minor) of the toolkit, (0, 0) when nvcc does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return (0, 0)
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cuda_wanted() -> str | None:
    """Path of nvcc when `_cuda` is to be built, None when not."""
    choice = os.environ.get("PLACEKERN_CUDA", "auto").lower()
    if choice not in ("auto", "on", "off"):
        sys.exit(f"placekern: PLACEKERN_CUDA={choice} is not one of auto, on, off.")
    nvcc = None if choice == "off" else find_nvcc()
    if choice == "auto" and nvcc is not None and cuda_version(nvcc) < (12, 0):
        print(f"placekern: {nvcc} is older than CUDA 12.0 or does not run: building for the CPU.")
        return None
    if choice == "on" and nvcc is None:
        sys.exit(
            "placekern: PLACEKERN_CUDA=on, but nvcc was not found: install the CUDA toolkit (12.0 "
            "or newer) or point CUDA_HOME at it, or use PLACEKERN_CUDA=off for the CPU only."
        )
    return nvcc


def check_compiler() -> None:
    """Says what to install before CMake fails at length."""
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in names):
        sys.exit(
            "placekern: no C++ compiler found: install g++ 9 or newer (Debian, Ubuntu: apt install "
            "g++; Fedora: dnf install gcc-c++) or set CXX."
        )


class CMakeBuild(build_ext):
    """One CMake build for all extensions; CMake puts the modules where setuptools expects them."""

    def run(self) -> None:
        check_compiler()
        nvcc = cuda_wanted()
        if nvcc is None:
            self.extensions = [e for e in self.extensions if e.name != "placekern._cuda"]
        import pybind11

        package = Path(self.get_ext_fullpath("placekern._cpu")).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "--fresh",  # with build isolation, cmake, ninja and pybind11 move from build to build
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_BUILD_TYPE={os.environ.get('PLACEKERN_BUILD_TYPE', 'Release')}",
            f"-DPLACEKERN_OUTPUT={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPLACEKERN_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DPLACEKERN_WERROR={os.environ.get('PLACEKERN_WERROR', 'off')}",
        ]
        if nvcc:
            archs = os.environ.get("PLACEKERN_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]


setup(
    ext_modules=[Extension("placekern._cpu", []), Extension("placekern._cuda", [])],
    cmdclass={"build_ext": CMakeBuild},
)
