# SPDX-License-Identifier: MIT
"""hwerr-probe: the BPF probes, and the service that publishes what they see."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import socket
from collections.abc import Sequence

from .. import device as hwerr
from .. import probe
from ..bpf import BpfError, capable, unavailable
from ..event import RecordError
from . import EXIT_ERROR, EXIT_NO_DEVICE, EXIT_NO_PERMISSION, EXIT_OK, complain, output
from .parser import Parser

PROG = "hwerr-probe"
_CAP_SYS_ADMIN = 21  # linux/capability.h

EPILOG = """\
verbs:
  run      load the probes, publish what they see on the device, until SIGTERM or Ctrl-C. They
           stay in the kernel when it ends, and what comes meanwhile is published by the next
  status   which probes there are, and what each passed on and lost
  unload   take the probes out of the kernel (kvm.ko can be unloaded only then)

exit status:
  0    done; `status`: all probes are attached
  1    an error that none of these names; `status`: some probe is missing
  2    wrong usage
  4    no device: the module hwerr is not loaded
  5    no permission
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog=PROG,
        description="Probes for KVM failures, SIGBUS, block errors and killed VMs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("verb", choices=("run", "status", "unload"), metavar="run|status|unload")
    p.add_argument("--json", action="store_true", help="for status: one JSON object")
    p.add_argument("--device", default=hwerr.DEFAULT_PATH, metavar="PATH", help="default: %(default)s")
    return p


def notify(text: str) -> None:
    """Tells the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(text.encode())
        except OSError as error:
            complain(PROG, f"cannot tell the service manager: {error.strerror}")


def _stop_pipe() -> int:
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reading


def _tell(probes: probe.Probes) -> None:
    attached = [s.name for s in probes.status() if s.attached]
    for s in probes.status():
        if not s.attached:
            complain(PROG, f"without the {s.name} probe: {s.reason}")
    notify(f"READY=1\nSTATUS=attached: {', '.join(attached) or 'none'}")


def run(path: str) -> int:
    """Publishes until told to stop."""
    stop = _stop_pipe()
    with hwerr.open(path, publish=True, names=False) as device:
        reader = hwerr.open(path, since="oldest", module=True, names=False)
        direct = hwerr.open(path, sources=probe.DIRECT, module=True, names=False)
        with reader, direct, probe.Probes() as probes:
            publisher = probe.Publisher(probes, device, reader)
            try:
                _tell(probes)
                probe.serve(publisher, probes, direct, stop, lambda: _tell(probes))
            finally:
                publisher.close()
    return EXIT_OK


def show_status(as_json: bool) -> int:
    """Prints it; whether all is there."""
    reason = unavailable()
    if reason and "not permitted" in reason:
        complain(PROG, reason)
        return EXIT_NO_PERMISSION
    found = probe.status()
    with output():
        if as_json:
            print(json.dumps({s.name: s.to_json() for s in found}))
        elif not found:
            print(f"no probe is loaded{': ' + reason if reason else f'; `{PROG} run` does it'}")
        else:
            for s in found:
                state = "attached" if s.attached else "missing"
                why = s.reason or s.way
                print(f"{s.name:8} {state:9} {s.emitted:8} passed on {s.dropped:8} lost  {why}")
    return EXIT_OK if found and all(s.attached for s in found) else EXIT_ERROR


def unload() -> int:
    if not capable(_CAP_SYS_ADMIN):
        complain(PROG, "not permitted: run as root")
        return EXIT_NO_PERMISSION
    try:
        with probe.only_one():
            if not probe.unload():
                complain(PROG, "no probe was loaded")
    except BlockingIOError:
        # It would go on, and see nothing any more.
        complain(PROG, f"`{PROG} run` has them: stop it first (systemctl stop hwerr-probe)")
        return EXIT_ERROR
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments, runs, and returns the exit status."""
    args = parser().parse_args(argv)
    try:
        match args.verb:
            case "run":
                return run(args.device)
            case "status":
                return show_status(args.json)
            case _:
                return unload()
    except BrokenPipeError:
        raise
    except BpfError as error:
        complain(PROG, str(error.strerror))
        return EXIT_NO_PERMISSION if "not permitted" in str(error.strerror) else EXIT_ERROR
    except RecordError as error:
        complain(PROG, f"{args.device} gave a record that this version does not understand: {error}")
        return EXIT_ERROR
    except BlockingIOError:
        complain(PROG, "another one runs: stop it first")
        return EXIT_ERROR
    except OSError as error:
        match error.errno:
            case errno.ENOENT | errno.ENODEV | errno.ENXIO:
                complain(PROG, f"{args.device} is not there: load the module with `modprobe hwerr`")
                return EXIT_NO_DEVICE
            case errno.EACCES | errno.EPERM:
                complain(PROG, "not permitted: run as root")
                return EXIT_NO_PERMISSION
        complain(PROG, f"{error.filename or args.device}: {error.strerror or error}")
        return EXIT_ERROR
