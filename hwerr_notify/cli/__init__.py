# SPDX-License-Identifier: MIT
# PYTHON_ARGCOMPLETE_OK
"""Commands. The only part of the package that prints.

What is here loads fast and is all that runs before a command can answer Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

# Exit statuses that all commands share.
EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING, EXIT_NO_DEVICE, EXIT_NO_PERMISSION = range(6)
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141


class OutputError(Exception):
    """What was to be written could not be, for another reason than a closed pipe."""


@contextmanager
def output() -> Iterator[None]:
    """Around whatever writes to stdout: flushes it, and tells its errors from the device's."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from None


def complain(prog: str, text: str) -> None:
    """One line on stderr, if there still is one."""
    try:
        # What others named must not move a terminal's cursor, or forge a line.
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        sys.stderr.write(f"{prog}: {safe}\n")
        sys.stderr.flush()
    except (OSError, AttributeError):
        pass


def give_up_stdout() -> None:
    """What is still buffered goes nowhere, so that the end is silent."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def run(prog: str, module: str) -> int:
    """Runs main() of the command's module; an interrupt and a closed pipe are no traceback."""
    try:
        if sys.stdout is None:
            raise OutputError("it is closed")
        # Whatever the locale, a character it lacks is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        status: int = import_module(module, __name__).main()
        with output():
            pass
    except KeyboardInterrupt:
        complain(prog, "interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        give_up_stdout()
        complain(prog, "output was closed by its reader")
        return EXIT_PIPE
    except OutputError as error:
        give_up_stdout()
        complain(prog, f"cannot write the output: {error}")
        return EXIT_ERROR
    return status


def hwerr_watch() -> int:
    """Entry point of hwerr-watch."""
    return run("hwerr-watch", ".watch")


def hwerr_guard() -> int:
    """Entry point of hwerr-guard."""
    return run("hwerr-guard", ".guard")


def hwerr_probe() -> int:
    """Entry point of hwerr-probe."""
    return run("hwerr-probe", ".probe")


def hwerr_trace() -> int:
    """Entry point of hwerr-trace."""
    return run("hwerr-trace", ".trace")
