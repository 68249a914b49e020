# SPDX-License-Identifier: MIT
"""Builds hwerr_notify._uapi from kmod/uapi/hwerr.h, the one definition of the protocol.

The C compiler's preprocessor resolves the header; what it leaves of it (structs,
enums, the names of its macros) is what cffi is told to look for, and the compiler
supplies every value, size and offset. Run by setuptools, not imported at run time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import cffi

HEADER = Path(__file__).resolve().parent.parent / "kmod/uapi/hwerr.h"
SOURCE = Path(__file__).resolve().parent / "_scan.c"

SCAN = """
int64_t hwerr_scan(const uint8_t *buf, size_t len);
"""


def preprocessed(header: Path) -> str:
    """The header's own lines after preprocessing, `#define` lines kept (cc -E -dD)."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    argv = [*compiler, "-std=gnu99", "-E", "-dD", str(header)]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    own, lines = False, []
    for line in text.splitlines():
        if mark := re.match(r'# \d+ "([^"]*)"', line):
            own = mark[1] == str(header)
        elif own:
            lines.append(line)
    return "\n".join(lines)


def declarations(header: Path) -> str:
    """The cdef: types as they stand, and the name of every macro with a value."""
    text = preprocessed(header)
    macros = re.findall(r"^#define (\w+) +\S", text, re.MULTILINE)
    types = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    types = re.sub(r"\b__([us])(8|16|32|64)\b", lambda m: f"{'u' * (m[1] == 'u')}int{m[2]}_t", types)
    if not macros or "struct hwerr_record" not in types:
        raise RuntimeError(f"{header}: found no declarations in it")
    return types + "".join(f"#define {name} ...\n" for name in macros)


def make() -> cffi.FFI:
    """The builder that setup.py names."""
    ffi = cffi.FFI()
    ffi.cdef(declarations(HEADER))
    ffi.cdef(SCAN)
    digest = hashlib.sha256(HEADER.read_bytes()).hexdigest()
    ffi.cdef("static char *const HWERR_HEADER_SHA256;")
    ffi.set_source(
        "hwerr_notify._uapi",
        SOURCE.read_text(encoding="ascii") + f'static char *const HWERR_HEADER_SHA256 = "{digest}";\n',
        include_dirs=[str(HEADER.parent)],
        depends=[str(HEADER), str(SOURCE)],
    )
    return ffi


ffibuilder = make()

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
