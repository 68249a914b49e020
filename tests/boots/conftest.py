# SPDX-License-Identifier: MIT
"""Tests that boot VMs of their own, one after another, with something that outlives them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
