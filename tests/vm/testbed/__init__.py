# SPDX-License-Identifier: MIT
"""The test bed: a VM that takes real hardware errors, and what provokes them from inside."""
