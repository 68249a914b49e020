# SPDX-License-Identifier: MIT
"""hwerr-guard: takes a VM that was hit out of the world, and keeps it.

policy     what the operator wants         store      incidents, durable
process    a QEMU as the kernel sees it    monitor    a QEMU as its monitor sees it
steps      stop, record, release, seal, tell, keep
disks, net, seal, dump, tell               what the steps do
vm, daemon, control, front, metrics        the service around them
threads    for what blocks and may not come back
"""
