# SPDX-License-Identifier: MIT
"""Commands. The only part of the package that prints.

What is here loads fast and is all that runs before a command can answer Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

# Exit statuses that all commands share.
EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING, EXIT_NO_DEVICE, EXIT_NO_PERMISSION = range(6)
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141


def complain(prog: str, text: str) -> None:
    """One line on stderr, if there still is one."""
    try:
        sys.stderr.write(f"{prog}: {text}\n")
        sys.stderr.flush()
    except (OSError, AttributeError):
        pass


def give_up_stdout() -> None:
    """What is still buffered for a closed pipe goes nowhere, so the end is silent."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def run(prog: str, module: str) -> int:
    """Runs main() of the command's module; an interrupt and a closed pipe are no traceback."""
    try:
        status: int = import_module(module, __name__).main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        complain(prog, "interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        give_up_stdout()
        complain(prog, "output was closed by its reader")
        return EXIT_PIPE
    except OSError as error:
        give_up_stdout()
        complain(prog, f"{error.filename or 'output'}: {error.strerror or error}")
        return EXIT_ERROR
    return status


def watch() -> int:
    """hwerr-watch"""
    return run("hwerr-watch", ".watch")
