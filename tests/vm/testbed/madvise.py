# SPDX-License-Identifier: MIT
"""A process that has memory, and poisons it on request: `python -m testbed.madvise`.

Maps memory, touches it, prints {"pid", "va", "len", "pfn", "phys"} as one JSON line,
waits for a line on stdin ("poison"), calls madvise(MADV_HWPOISON) on the first page,
prints {"poisoned": true} and waits for the end of stdin. With --now it does not wait.
The SIGBUS that some kernels (6.12) send for it is caught.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import signal
import sys

from .pagemap import PAGE_SIZE, pfn_of

MADV_HWPOISON = 100
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--len", type=lambda s: int(s, 0), default=PAGE_SIZE)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--now", action="store_true")
    args = parser.parse_args()
    flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if args.shared else mmap.MAP_PRIVATE)
    memory = mmap.mmap(-1, args.len, flags=flags)
    for at in range(0, args.len, PAGE_SIZE):
        memory[at] = 0xA5
    va = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pfn = pfn_of(os.getpid(), va)
    facts = {"pid": os.getpid(), "va": hex(va), "len": args.len, "pfn": pfn, "phys": hex(pfn * PAGE_SIZE)}
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    if not args.now and sys.stdin.readline().strip() != "poison":
        return 0
    signal.signal(signal.SIGBUS, lambda *_: None)
    if _libc.madvise(va, PAGE_SIZE, MADV_HWPOISON) != 0:
        sys.stderr.write(f"madvise(MADV_HWPOISON): {os.strerror(ctypes.get_errno())}\n")
        return 1
    if not args.now:
        sys.stdout.write(json.dumps({"poisoned": True}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
