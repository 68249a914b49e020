# SPDX-License-Identifier: MIT
"""Only what pyproject.toml cannot say: the extension compiled from the UAPI header."""

from setuptools import setup

setup(cffi_modules=["hwerr_notify/_build.py:ffibuilder"])
