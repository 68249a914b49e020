# SPDX-License-Identifier: MIT
"""Tests of the test bed that run on the host; some boot VMs of their own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))
