# SPDX-License-Identifier: MIT
"""The one exception of the test bed."""

from __future__ import annotations


class TestbedError(Exception):
    """Something the test bed needs is missing or refused; the message says what to do."""

    __test__ = False
