# SPDX-License-Identifier: MIT
"""testguest: start, ask and end real QEMU guests inside a test VM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import guest as guests
from . import pagemap, vfio
from .errors import TestbedError
from .guest import Guest, GuestConfig, parse_size

EPILOG = """\
A guest goes on running after `testguest start` until `testguest stop`.

exit status: 0 done, 1 refused or something is missing, 2 wrong usage
"""


def number(text: str) -> int:
    return int(text, 0)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="testguest",
        description="Real QEMU guests inside a test VM.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    p = verbs.add_parser("start", help="start a guest; prints its pid, name, uuid and sockets as JSON")
    p.add_argument("--name", default="guest")
    p.add_argument("--mem", type=parse_size, default=64 << 20, metavar="SIZE", help="(default: 64M)")
    p.add_argument("--backing", choices=guests.BACKINGS, default="anon")
    p.add_argument("--path", default="", help="file of backing file; two guests with one path share memory")
    p.add_argument("--accel", choices=("kvm", "tcg"), default="kvm")
    p.add_argument("--code", choices=guests.CODES, default="halt", help="what the guest does (default: halt)")
    p.add_argument("--smp", type=int, default=1)
    p.add_argument("--uuid", default="", help="(default: a random one)")
    p.add_argument("--prealloc", action=argparse.BooleanOptionalAction, default=True,
                   help="touch all memory at start (default: yes)")  # fmt: skip
    p.add_argument(
        "--vfio", metavar="DEVICE", help="hand it this PCI device (address, or QEMU id such as aer0)"
    )
    p.add_argument("extra", nargs="*", metavar="-- QEMU-OPTION", help="more options for QEMU")
    for verb, text in (
        ("stop", "end a guest"),
        ("status", "QEMU's run state, pid, counter"),
        ("mtree", "its memory map, as QEMU prints it"),
    ):
        verbs.add_parser(verb, help=text).add_argument("name", nargs="?", default="guest")
    for verb, text in (
        ("gpa", "one guest-physical address: HVA and HPA as QEMU says, frame as pagemap says; JSON"),
        ("gpa2hpa", "host-physical address of a guest-physical one"),
        ("gpa2hva", "address in QEMU's process of a guest-physical one"),
    ):
        p = verbs.add_parser(verb, help=text)
        p.add_argument("name")
        p.add_argument("gpa", type=number)
    p = verbs.add_parser("hmp", help="a line for its human monitor")
    p.add_argument("name")
    p.add_argument("line", nargs="+")
    verbs.add_parser("list", help="names of the running guests")
    return parser


def _start(args: argparse.Namespace) -> dict[str, object]:
    extra = tuple(args.extra)
    if args.vfio:
        extra += ("-device", f"vfio-pci,host={vfio.bind(args.vfio)}")
    config = GuestConfig(
        name=args.name, mem=args.mem, backing=args.backing, accel=args.accel, code=args.code, smp=args.smp,
        prealloc=args.prealloc, uuid=args.uuid, path=args.path, extra=extra,
    )  # fmt: skip
    guest = Guest.start(config)
    facts = {"pid": guest.pid, "name": args.name, "uuid": guest.uuid, "qmp": str(guest.qmp_path)}
    guest.detach()
    return facts


def run(args: argparse.Namespace) -> str:
    if args.verb == "start":
        return json.dumps(_start(args)) + "\n"
    if args.verb == "list":
        return "".join(f"{name}\n" for name in guests.running())
    guest = Guest.attach(args.name)
    try:
        match args.verb:
            case "stop":
                guest.shutdown()
                return ""
            case "status":
                facts = {"pid": guest.pid, "uuid": guest.uuid, "status": guest.status()}
                facts["counter"] = guest.counter()
                return json.dumps(facts) + "\n"
            case "mtree":
                return guest.mtree()
            case "gpa2hpa":
                return f"{guest.gpa2hpa(args.gpa):#x}\n"
            case "gpa2hva":
                return f"{guest.gpa2hva(args.gpa):#x}\n"
            case "hmp":
                return guest.hmp(" ".join(args.line))
            case _:
                hva, hpa = guest.gpa2hva(args.gpa), guest.gpa2hpa(args.gpa)
                pfn = pagemap.pfn_of(guest.pid, hva)
                addresses = {"gpa": hex(args.gpa), "hva": hex(hva), "hpa": hex(hpa), "pfn": pfn}
                return json.dumps(addresses) + "\n"
    finally:
        if guest.qmp is not None:
            guest.detach()


def main(argv: Sequence[str]) -> int:
    """Entry point of testguest."""
    try:
        args = make_parser().parse_args(argv)
        sys.stdout.write(run(args))
    except TestbedError as error:
        sys.stderr.write(f"testguest: {error}\n")
        return 1
    return 0
