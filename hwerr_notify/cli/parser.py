# SPDX-License-Identifier: MIT
"""The parser of arguments that all commands have."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from . import EXIT_USAGE, complain


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; that of a verb, too, names the command alone."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.split()[0]
        complain(command, f"{message} (see {command} --help)")
        sys.exit(EXIT_USAGE)
