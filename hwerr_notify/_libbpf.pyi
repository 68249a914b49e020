# SPDX-License-Identifier: MIT
from typing import Any

# What is in it is what _libbpf_build.py declares.
ffi: Any
lib: Any
