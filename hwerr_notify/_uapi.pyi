# SPDX-License-Identifier: MIT
from typing import Any

# What is in it is whatever kmod/uapi/hwerr.h defines.
ffi: Any
lib: Any
