# SPDX-License-Identifier: MIT
"""hwerr-guard: the daemon that freezes VMs, and what an operator tells it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import device as hwerr
from ..guard import policy as policies
from ..guard.errors import GuardError
from ..guard.store import Store
from ..message import printable
from . import EXIT_ERROR, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, complain, output
from .parser import Parser

PROG = "hwerr-guard"
EXIT_NO_DAEMON = 6
EXIT_NOT_FROZEN = 7
EXIT_WEAKER = 8
EXIT_FROZEN = 10
EXIT_NOT_WHOLE = 11

EPILOG = """\
exit status:
  0    done; of `status VM`: guarded; of `check`: this host has everything
  1    an error; stderr says which. Of `check`: something is missing
  2    wrong usage, or a policy that cannot be used
  3    there is no such VM
  6    the daemon does not run (`status` then shows what is on disk)
  7    of `freeze`: the VM is not FROZEN; the step that failed is said
  8    of `check`: it works, but something only by weaker means
  10   of `status VM`: FROZEN
  11   of `status VM`: being frozen, or the freeze failed
  130  interrupted (Ctrl-C)

examples:
  hwerr-guard check                     can this host stop, release and seal?
  hwerr-guard run                       the daemon, as systemd starts it
  hwerr-guard status web1; echo $?      10 if it is FROZEN
  hwerr-guard freeze web1               by hand, for a test or on suspicion
  hwerr-guard inspect INCIDENT          what happened, which step, where the dump is
  hwerr-guard clear INCIDENT            end its QEMU, after the post-mortem
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog=PROG,
        description="Stop, release, seal and keep VMs that a hardware error hit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--policy", type=Path, default=policies.DEFAULT_PATH, metavar="FILE",
                   help="default: %(default)s")  # fmt: skip
    verbs = p.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    run = verbs.add_parser("run", help="the daemon")
    run.add_argument("--device", default=hwerr.DEFAULT_PATH, metavar="PATH", help="default: %(default)s")
    check = verbs.add_parser("check", help="is this host able? one line a capability")
    check.add_argument("--device", default=hwerr.DEFAULT_PATH, metavar="PATH", help="default: %(default)s")
    check.add_argument("--json", action="store_true", help="one JSON object a line")
    status = verbs.add_parser("status", help="VMs and incidents")
    status.add_argument("name", nargs="?", metavar="VM", help="only this one; the exit status says its state")
    status.add_argument("--json", action="store_true", help="one JSON object")
    freeze = verbs.add_parser("freeze", help="freeze a VM now, or once more after a failure")
    freeze.add_argument("name", metavar="VM", help="its name, UUID or process number")
    verbs.add_parser("events", help="what happens from now on, one JSON object a line")
    inspect = verbs.add_parser("inspect", help="all that is known of an incident, as JSON")
    inspect.add_argument("name", metavar="INCIDENT")
    dump = verbs.add_parser("dump", help="dump a frozen VM's memory, now")
    dump.add_argument("name", metavar="INCIDENT|VM")
    clear = verbs.add_parser("clear", help="end a frozen VM's QEMU and close the incident")
    clear.add_argument("name", metavar="INCIDENT")
    return p


# -- talking to the daemon -----------------------------------------------------


class NoDaemonError(GuardError):
    """Nobody listens."""


class Conversation:
    """One request; iterate over its lines, then look at `status`."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(os.fspath(path))
        except PermissionError:
            raise GuardError(f"{path}: not permitted: run as root") from None
        except OSError:
            raise NoDaemonError("the daemon does not run: systemctl start hwerr-guard") from None
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self.status = EXIT_ERROR

    def __iter__(self) -> Iterator[Any]:
        """GuardError for what the daemon refuses."""
        with self._socket, self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "line" in message:
                    yield message["line"]
                    continue
                self.status = message["end"]["status"]
                if message["end"]["error"]:
                    raise GuardError(message["end"]["error"])
                return
        raise GuardError("the daemon ended before it had answered")


def ask(policy: policies.Policy, verb: str, **more: Any) -> tuple[list[Any], int]:
    """All lines, and the status."""
    conversation = Conversation(policy.run_dir / "control", {"verb": verb, **more})
    return list(conversation), conversation.status


# -- verbs -----------------------------------------------------------------------


class _Formatter(logging.Formatter):
    """One line a message, whatever QEMU said in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def do_run(policy: policies.Policy, args: argparse.Namespace) -> int:
    import asyncio

    from ..guard.daemon import Guard

    form = "%(levelname)s: %(message)s"
    if "JOURNAL_STREAM" not in os.environ:
        form = "%(asctime)s " + form
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    asyncio.run(Guard(policy, args.device).run())
    # All that matters is on disk; a thread that hangs would be waited for.
    logging.shutdown()
    os._exit(EXIT_OK)


def do_check(policy: policies.Policy, args: argparse.Namespace) -> int:
    from ..guard.check import check

    found = list(check(policy, args.device))
    with output():
        for c in found:
            if args.json:
                print(json.dumps({"name": c.name, "state": c.state, "text": c.text}))
            else:
                print(f"{c.name:10} {c.state:8} {c.text}")
    states = {c.state for c in found}
    return EXIT_ERROR if "missing" in states else EXIT_WEAKER if "weaker" in states else EXIT_OK


def _from_disk(policy: policies.Policy) -> dict[str, Any]:
    """What `status` says without a daemon."""
    from ..guard.daemon import summary

    found = list(Store(policy.state_dir).all())
    return {
        "daemon": None,
        "policy": str(policy.path),
        "vms": [],
        "incidents": [summary(i) for i in found if not isinstance(i, GuardError)],
        "unreachable": {},
        "damaged": [str(i) for i in found if isinstance(i, GuardError)],
    }


def do_status(policy: policies.Policy, args: argparse.Namespace) -> int:
    code = EXIT_OK
    try:
        (form,), _ = ask(policy, "status")
    except NoDaemonError as error:
        complain(PROG, str(error))
        form, code = _from_disk(policy), EXIT_NO_DAEMON
    if args.name is not None:
        form["vms"] = [v for v in form["vms"] if args.name in (v["name"], v["uuid"], str(v["pid"]))]
        form["incidents"] = [i for i in form["incidents"] if i["vm"] == args.name or i["id"] == args.name]
        if code == EXIT_OK:
            if not form["vms"]:
                complain(PROG, f"no VM {args.name} is guarded")
                return EXIT_NOTHING
            states = {v["state"] for v in form["vms"]}
            code = (
                EXIT_FROZEN if states == {"frozen"} else EXIT_OK if states == {"guarded"} else EXIT_NOT_WHOLE
            )
    with output():
        if args.json:
            print(json.dumps(form))
        else:
            for text in _status_lines(form):
                print(printable(text))
    return code


def _status_lines(form: dict[str, Any]) -> Iterator[str]:
    for vm in form["vms"]:
        state = "FROZEN" if vm["state"] == "frozen" else vm["state"]
        text = f"{vm['name']:20} {state:9} pid {vm['pid']}"
        if vm["state"] == "guarded":
            text += (
                f", stopped by the {vm['stopped_by']}"
                if vm["stopped_by"] == "kernel"
                else ", stopped by QEMU"
            )
        else:
            text += f", incident {vm['incident']}"
        text += ", monitor not connected" if vm["monitor"] is None else ""
        text += f", degraded: {vm['degraded']}" if vm["degraded"] else ""
        if vm["dumping"]:
            done, total = vm["dumping"]
            text += f", dumping {100 * done // max(total, 1)} %"
        yield text
    for incident in form["incidents"]:
        text = f"{incident['id']}  {incident['state']}: {incident['message']}"
        text += f"; {incident['failed_step']} failed: {incident['why']}" if incident["failed_step"] else ""
        text += f"; {incident['dump']}" if incident["dump"] else ""
        yield text
    for path, why in form["unreachable"].items():
        yield f"{path}: not guarded: {why}"
    yield from form["damaged"]
    if not form["vms"] and not form["incidents"]:
        yield "no VM is guarded"


def do_freeze(policy: policies.Policy, args: argparse.Namespace) -> int:
    lines, status = ask(policy, "freeze", name=args.name)
    incident = lines[0]
    if status == EXIT_OK:
        with output():
            print(f"{incident['vm']} is FROZEN: incident {incident['id']}")
        return EXIT_OK
    failed = [f"{name}: {s['detail']}" for name, s in incident["steps"].items() if s["state"] == "failed"]
    complain(
        PROG, f"{incident['vm']} is not FROZEN ({incident['id']}): {'; '.join(failed + incident['notes'])}"
    )
    return status


def do_events(policy: policies.Policy, args: argparse.Namespace) -> int:
    conversation = Conversation(policy.run_dir / "control", {"verb": "events"})
    for event in conversation:
        with output():
            print(json.dumps(event))
    return conversation.status


def do_inspect(policy: policies.Policy, args: argparse.Namespace) -> int:
    incident = Store(policy.state_dir).load(args.name)
    with output():
        print(json.dumps(incident.to_json(), indent=2))
    return EXIT_OK


def do_dump(policy: policies.Policy, args: argparse.Namespace) -> int:
    conversation = Conversation(policy.run_dir / "control", {"verb": "dump", "name": args.name})
    for line in conversation:
        if "progress" in line:
            done, total = line["progress"]
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{100 * done // max(total, 1):3} %")
            continue
        if sys.stderr.isatty():
            sys.stderr.write("\r")
        with output():
            print(line["path"])
            for gpa, length in line["skipped"]:
                print(f"skipped: {length} bytes at guest-physical {gpa}")
    return conversation.status


def do_clear(policy: policies.Policy, args: argparse.Namespace) -> int:
    lines, status = ask(policy, "clear", name=args.name)
    with output():
        print(f"{lines[0]['vm']}: incident {lines[0]['id']} is cleared, its QEMU has ended")
    return status


VERBS = {
    "run": do_run,
    "check": do_check,
    "status": do_status,
    "freeze": do_freeze,
    "events": do_events,
    "inspect": do_inspect,
    "dump": do_dump,
    "clear": do_clear,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments, runs, and returns the exit status."""
    args = parser().parse_args(argv)
    try:
        policy = policies.load(args.policy)
        return VERBS[args.verb](policy, args)
    except policies.PolicyError as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    except NoDaemonError as error:
        complain(PROG, str(error))
        return EXIT_NO_DAEMON
    except GuardError as error:
        complain(PROG, str(error))
        return EXIT_ERROR
