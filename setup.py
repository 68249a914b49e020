# SPDX-License-Identifier: MIT
"""Only what pyproject.toml cannot say: the extensions, and the BPF programs shipped as data."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Compiles the BPF programs first, if this machine can: the core works without."""

    def run(self) -> None:
        script = Path(__file__).resolve().parent / "scripts" / "build-bpf"
        if subprocess.run([script], check=False).returncode != 0:
            sys.stderr.write("setup: going on without the BPF programs\n")
        super().run()


setup(
    cffi_modules=["hwerr_notify/_build.py:ffibuilder", "hwerr_notify/_libbpf_build.py:ffibuilder"],
    cmdclass={"build_py": BuildPy},
)
