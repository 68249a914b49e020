# SPDX-License-Identifier: MIT
"""hwerr-inject: raise hardware errors inside a test VM."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import inject, pagemap, records
from .errors import TestbedError
from .kernel import put
from .qmp import Monitor

EPILOG = """\
mce-real and aer-real make the virtual hardware raise the error; every other verb
enters the kernel as near to the hardware as it allows. Runs in a VM started by
tests/vm/run; the kernel's own injector modules and hwerr_sim.ko are loaded on demand.

exit status: 0 injected, 1 refused or something is missing, 2 wrong usage
"""


def number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number (0x… for hexadecimal)") from None
    if not -(1 << 63) <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"'{text}' does not fit into 64 bits")
    return value


def _add_mce_fields(p: argparse.ArgumentParser) -> None:
    p.add_argument("--status", type=number, help="MCi_STATUS")
    p.add_argument("--addr", type=number, default=0, help="MCi_ADDR; bit 58 of the status is yours to set")
    p.add_argument("--misc", type=number, default=0, help="MCi_MISC; 0x8c: physical address, 4 KiB")
    p.add_argument("--mcgstatus", type=number, default=0, help="MCG_STATUS (default: 0)")
    p.add_argument("--bank", type=number, default=0, help="bank (default: 0)")
    p.add_argument("--cpu", type=number, default=0, help="CPU (default: 0)")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hwerr-inject",
        description="Raise a hardware error inside a test VM.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text)

    p = verb("mce-real", "machine check by the virtual CPU: #MC if uncorrected, else found by the next poll")
    _add_mce_fields(p)
    p.add_argument("--broadcast", choices=("auto", "yes", "no"), default="auto",
                   help="#MC on every CPU; auto: if uncorrected and --mcgstatus lacks LMCES (8)")  # fmt: skip
    p.add_argument("--poll", type=int, metavar="S", help="have the kernel poll the banks every S seconds")

    p = verb("mce", "machine check record into the decode chain (mce-inject, or hwerr_sim.ko)")
    _add_mce_fields(p)
    p.add_argument("--synd", type=number, default=0, help="MCA_SYND of AMD (default: 0)")
    p.add_argument("--ipid", type=number, default=0, help="MCA_IPID of AMD (default: 0)")
    p.add_argument("--socket", type=number, default=0, help="CPU socket (default: 0)")
    p.add_argument("--cpuid", type=number, help="CPUID(1).EAX of the CPU it speaks of (default: this one)")
    p.add_argument("--vendor", type=number, help="X86_VENDOR_* of it (0 Intel, 2 AMD; default: this one)")
    p.add_argument("--file", type=Path, help="read records from here instead ('-': stdin)")
    p.add_argument("--syntax", choices=("mce-inject", "mcelog"), default="mce-inject", help="of --file")
    p.add_argument("--via", choices=("auto", "mce-inject", "sim"), default="auto",
                   help="auto: mce-inject, or hwerr_sim.ko for fields that mce-inject lacks")  # fmt: skip

    p = verb("aer-real", "AER error reported by a virtual PCI device")
    p.add_argument("--device", default="aer0", help="QEMU id (default: aer0)")
    p.add_argument("--error", required=True, help="QEMU's name (BAD_TLP, POISON_TLP, MALF_TLP …) or bit")
    p.add_argument("-c", "--correctable", action="store_true", help="a bit is of the correctable register")
    p.add_argument("--header-log", type=number, nargs=4, default=(), metavar="DW", help="the TLP header")

    p = verb("aer", "AER error by the kernel's aer_inject module; several bits at once are possible")
    p.add_argument("--bdf", "--device", dest="bdf", help="PCI address, or QEMU id (default: aer0)")
    p.add_argument("--cor-status", type=number, default=0, metavar="BITS")
    p.add_argument("--uncor-status", type=number, default=0, metavar="BITS")
    p.add_argument("--header-log", type=number, nargs=4, metavar="DW", help="the TLP header")
    p.add_argument("--file", type=Path, help="read records in aer-inject's language from it ('-': stdin)")
    p.add_argument("--mask-override", action="store_true", help="report bits that the device masks, too")

    p = verb("edac", "error of a memory controller (hwerr_sim.ko)")
    p.add_argument("--mc", type=number, default=0, help="controller: 0 or 1 (default: 0)")
    p.add_argument("--type", choices=("ce", "ue", "deferred", "fatal", "info"), default="ce")
    p.add_argument("--page", type=number, default=0, help="page frame number")
    p.add_argument("--offset", type=number, default=0, help="offset in the page")
    p.add_argument("--grain", type=number, default=64, help="resolution in bytes (default: 64)")
    p.add_argument("--syndrome", type=number, default=0)
    p.add_argument("--label", help="DIMM_A1 … DIMM_B2 (mc 0), DIMM_C1 … DIMM_D2 (mc 1); sets --mc, --layers")
    p.add_argument("--layers", type=number, nargs=3, default=(0, 0, -1), metavar=("CHANNEL", "SLOT", "LOW"),
                   help="-1: unknown (default: 0 0 -1)")  # fmt: skip
    p.add_argument("--count", type=number, default=1, help="errors in this one report (default: 1)")
    p.add_argument("--repeat", type=number, default=1, help="so many reports (default: 1)")
    p.add_argument("--silent", action="store_true", help="have EDAC log no error to the console any more")
    p.add_argument("--msg", default="simulated error")

    p = verb("extlog", "memory error as firmware's extended log reports it (hwerr_sim.ko)")
    p.add_argument("--severity", choices=tuple(inject.CPER_SEV), default="corrected")
    p.add_argument("--addr", type=number, help="physical address")
    p.add_argument("--mask", type=number, default=0, help="its mask; 0 is none")
    p.add_argument("--text", default="", help="FRU text")

    p = verb("non-standard", "firmware error record of any section type (hwerr_sim.ko)")
    p.add_argument("--severity", choices=tuple(inject.GHES_SEV), default="corrected")
    p.add_argument("--section", required=True, metavar="GUID")
    p.add_argument("--fru", metavar="GUID")
    p.add_argument("--data", type=bytes.fromhex, default=b"", metavar="HEX")
    p.add_argument("--text", default="", help="FRU text")

    p = verb("hwpoison", "memory failure of a page frame (hwpoison-inject)")
    p.add_argument("--pfn", type=number, required=True)
    p.add_argument("--unpoison", action="store_true", help="take the frame back into use instead")

    p = verb("madvise", "memory failure by MADV_HWPOISON in a process started for it; prints pid and address")
    p.add_argument("--va-len", type=number, default=pagemap.PAGE_SIZE, metavar="BYTES", help="its memory")
    p.add_argument("--shared", action="store_true", help="MAP_SHARED instead of MAP_PRIVATE")

    p = verb("pfn", "physical address behind an address of a process")
    p.add_argument("--pid", type=int, required=True)
    p.add_argument("--va", type=number, required=True)

    p = verb("monitor", "run a line in the human monitor of this VM's QEMU")
    p.add_argument("line", nargs="+")
    return parser


def _read(path: Path) -> str:
    if str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise TestbedError(f"cannot read {path}: {error.strerror}") from error


def _mce_record(args: argparse.Namespace) -> records.MceRecord:
    if args.status is None:
        raise TestbedError("--status is missing")
    common = ("status", "addr", "misc", "mcgstatus", "bank", "cpu")
    names = (*common, "synd", "ipid", "socket", "cpuid", "vendor")
    return records.MceRecord(**{n: getattr(args, n) for n in names if hasattr(args, n)})


def _mce(args: argparse.Namespace) -> None:
    if args.file is None:
        found = [_mce_record(args)]
    else:
        parse = records.parse_mce_inject if args.syntax == "mce-inject" else records.parse_mcelog
        found = parse(_read(args.file))
    send = {"auto": inject.mce_any, "mce-inject": inject.mce, "sim": inject.mce_sim}[args.via]
    for record in found:
        send(record)


def _aer(args: argparse.Namespace) -> None:
    if args.file is None:
        if not args.cor_status and not args.uncor_status:
            raise TestbedError("give --cor-status, --uncor-status or --file")
        header = tuple(args.header_log) if args.header_log else None
        found = [records.AerRecord(args.cor_status, args.uncor_status, header)]
    else:
        found = records.parse_aer_inject(_read(args.file))
    for record in found:
        inject.aer(replace(record, device=args.bdf or record.device or "aer0"), args.mask_override)


def _edac(args: argparse.Namespace) -> None:
    mc, layers = args.mc, tuple(args.layers)
    if args.label:
        mc, layers = inject.edac_layers(args.label)
    if args.silent:
        for name in ("edac_mc_log_ce", "edac_mc_log_ue"):
            put(Path("/sys/module/edac_core/parameters", name), "0")
    inject.edac(
        args.type, mc=mc, page=args.page, offset=args.offset, grain=args.grain, syndrome=args.syndrome,
        layers=layers, count=args.count, repeat=args.repeat, msg=args.msg,
    )  # fmt: skip


def _mce_real(args: argparse.Namespace) -> None:
    if args.poll is not None:
        inject.poll_banks(args.poll)
    inject.mce_real(_mce_record(args), {"auto": None, "yes": True, "no": False}[args.broadcast])


def _madvise(args: argparse.Namespace) -> None:
    argv = [sys.executable, "-m", "testbed.madvise", "--now", "--len", str(args.va_len)]
    if args.shared:
        argv.append("--shared")
    done = subprocess.run(argv, check=False, cwd=Path(__file__).resolve().parents[1])
    if done.returncode != 0:
        raise TestbedError(f"the process ended with {done.returncode}")


def run(args: argparse.Namespace) -> None:
    out = sys.stdout.write
    match args.verb:
        case "mce-real":
            _mce_real(args)
        case "mce":
            _mce(args)
        case "aer-real":
            out(inject.aer_real(args.device, args.error, args.correctable, tuple(args.header_log)) + "\n")
        case "aer":
            _aer(args)
        case "edac":
            _edac(args)
        case "extlog":
            inject.extlog(args.severity, args.addr, args.mask, args.text)
        case "non-standard":
            inject.non_standard(args.severity, args.section, args.data, args.fru, args.text)
        case "hwpoison":
            (inject.unpoison if args.unpoison else inject.hwpoison)(args.pfn)
        case "madvise":
            _madvise(args)
        case "pfn":
            pfn = pagemap.pfn_of(args.pid, args.va)
            out(json.dumps({"pfn": pfn, "phys": hex(pagemap.physical(args.pid, args.va))}) + "\n")
        case "monitor":
            with Monitor() as monitor:
                out(monitor.hmp(" ".join(args.line)))


def main(argv: Sequence[str]) -> int:
    """Entry point of hwerr-inject."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except TestbedError as error:
        sys.stderr.write(f"hwerr-inject {args.verb}: {error}\n")
        return 1
    return 0
