#!/usr/bin/env python3
"""Compiles copy.cu to the committed copy.ptx with NVRTC, without GPU, driver or CUDA toolkit.

    build.py FOLDER            writes copy.ptx
    build.py FOLDER --check    compares copy.ptx with what comes out, and writes nothing

NVRTC is the wheel that requirements.txt pins by its hash; pip puts it into FOLDER, where it stays
for the next time. The same source and wheel give the same bytes on every machine.

Exit status: 0 done or equal, 1 different or broken, 77 this machine cannot have NVRTC (no network,
or not x86-64): nothing was compiled or compared.
"""

import argparse
import ctypes
import difflib
import platform
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "copy.cu"
PTX = HERE / "copy.ptx"
REQUIREMENTS = HERE / "requirements.txt"
OPTIONS = ("--gpu-architecture=compute_70", "--std=c++03")
UNREACHABLE = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|Network is unreachable")
CANNOT = 77


class Unavailable(Exception):
    """This machine cannot have NVRTC; says why."""


class Nvrtc:
    """The few functions of libnvrtc that turn a source into PTX."""

    def __init__(self, folder):
        # The builtins first: libnvrtc looks them up by name when it compiles.
        ctypes.CDLL(str(folder / "libnvrtc-builtins.so.12.0"), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")

    def text(self, program, what):
        """`what` is PTX or ProgramLog."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, text)
        return text.value.decode()

    def compile(self, source, name):
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(),
                  0, None, None)
        options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
        try:
            self.call("nvrtcCompileProgram", program, len(options), options)
        except RuntimeError:
            print(self.text(program, "ProgramLog"), file=sys.stderr)
            raise
        return self.text(program, "PTX")


def fetch(folder):
    """The folder of the libraries; installs the pinned wheel into `folder` unless it is there."""
    libraries = folder / "nvidia" / "cuda_nvrtc" / "lib"
    stamp = folder / "installed"
    pinned = REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == pinned:
        return libraries
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("NVRTC of CUDA 12.0 comes as a wheel for Linux on x86-64 only")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade",
               "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check",
               "--root-user-action=ignore", "--target", str(folder),
               "--requirement", str(REQUIREMENTS)]
    pip = subprocess.run(command, check=False, capture_output=True, text=True)
    if pip.returncode:
        print(pip.stderr, file=sys.stderr)
        if UNREACHABLE.search(pip.stderr):
            raise Unavailable("the package index is out of reach")
        raise RuntimeError("pip could not install the pinned NVRTC: see above")
    stamp.write_text(pinned, encoding="utf-8")
    return libraries


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where NVRTC is kept")
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()

    try:
        libraries = fetch(arguments.folder)
    except Unavailable as why:
        done = "compared" if arguments.check else "compiled"
        print(f"{SOURCE.name} was NOT {done.upper()}: {why}", file=sys.stderr)
        return CANNOT
    ptx = Nvrtc(libraries).compile(SOURCE.read_text(encoding="utf-8"), SOURCE.name)
    if not arguments.check:
        PTX.write_text(ptx, encoding="utf-8")
        return 0
    committed = PTX.read_text(encoding="utf-8") if PTX.is_file() else ""
    if committed == ptx:
        print(f"{PTX.name} is what {SOURCE.name} gives")
        return 0
    sys.stderr.writelines(difflib.unified_diff(
        committed.splitlines(True), ptx.splitlines(True), "committed", "compiled"))
    print(f"{PTX.name} is not what {SOURCE.name} gives: run `make ptx`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
