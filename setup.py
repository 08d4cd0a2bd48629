"""Builds the native kernels with the package where a C++ compiler is there; everything works without them."""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/gristmill/kernels/native")
FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fno-exceptions -fno-rtti -fno-math-errno -Wall -Wextra -Wno-psabi"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma"
X86 = {
    "avx2": "-mavx2 -mfma",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
    "amx_bf16": f"{AVX512} -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16",
}


def build(library: Path, folder: Path, extra: str = "") -> None:
    """Compile kernels.cpp once for each instruction set, and link all of them as `library`."""
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *shlex.split(FLAGS), *shlex.split(extra)]
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = [folder / "cpu.o", folder / "team.o"]
    for made in objects:
        subprocess.run([*command, "-c", str(SOURCES / made.with_suffix(".cpp").name), "-o", str(made)], check=True)
    for isa, flags in ({"plain": ""} | (X86 if platform.machine() == "x86_64" else {})).items():
        made = folder / f"{isa}.o"
        one = [*command, *shlex.split(flags), f"-DISA={isa}", "-c", str(SOURCES / "kernels.cpp"), "-o", str(made)]
        if subprocess.run(one, check=isa == "plain").returncode == 0:
            objects.append(made)
        else:
            print(f"native kernels for {isa} are left out: {command[0]} does not compile them")
    # Linked without -fopenmp: OpenMP is found in the copy that torch brings, so that there is one pool of threads.
    linked = [flag for flag in command if flag != "-fopenmp"]
    subprocess.run([*linked, "-shared", *map(str, objects), "-o", str(library)], check=True)


class BuildNative(build_ext):
    """An "extension" without Python in it: a library for ctypes."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        installed = SOURCES.parent / library.name
        for stale in (library, installed):
            stale.unlink(missing_ok=True)
        try:
            build(library, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as problem:
            print(f"native kernels are left out, PyTorch's own serve instead: {problem}")


class Sanitize(Command):
    """setup.py sanitize --library FILE: a build that stops at a bad address or undefined behaviour."""

    user_options: ClassVar = [("library=", None, "where to put it")]

    library: str

    def initialize_options(self) -> None:
        self.library = "build/sanitized/native.so"

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        library = Path(self.library)
        build(library, library.parent, "-O1 -g -Werror -fsanitize=address,undefined -fno-sanitize-recover=undefined")


setup(
    ext_modules=[Extension("gristmill.kernels._native", [], optional=True)] if platform.system() == "Linux" else [],
    cmdclass={"build_ext": BuildNative, "sanitize": Sanitize},
)
