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
from typing import IO, Any

from .. import device as hwerr
from ..guard import policy as policies
from ..guard.errors import CannotBeginError, GuardError, NoSuchError
from ..guard.store import Store
from ..message import printable
from . import EXIT_ERROR, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, complain, output
from .parser import Parser

PROG = "hwerr-guard"
EXIT_NO_DAEMON = 6
EXIT_NOT_FROZEN = 7
EXIT_WEAKER = 8
EXIT_CANNOT_BEGIN = 9
EXIT_FROZEN = 10
EXIT_NOT_WHOLE = 11
EXIT_NO_ANSWER = 12

# A daemon that lives answers `status` at once: it asks nobody. Seconds.
_STATUS_WITHIN = 5.0

EPILOG = """\
exit status:
  0    done; of `status VM`: guarded; of `check`: this host has everything
  1    an error; stderr says which. Of `check`: something is missing
  2    wrong usage, or a policy that cannot be used
  3    there is no such VM, or no such incident
  6    the daemon does not run (`status` then shows what is on disk)
  7    of `freeze`: the VM is not FROZEN; the step that failed is said
  8    of `check`: it works, but something only by weaker means
  9    of `run`: it cannot begin, and is worth another try later
  10   of `status VM`: FROZEN
  11   of `status VM`: being frozen, the freeze failed, or it is being cleared
  12   of `status`: the daemon does not answer (what is on disk is shown)
  130  interrupted (Ctrl-C)

examples:
  hwerr-guard check                     can this host stop, release and seal?
  hwerr-guard run                       the daemon, as systemd starts it
  hwerr-guard status web1; echo $?      10 if it is FROZEN
  hwerr-guard freeze web1               by hand, for a test or on suspicion
  hwerr-guard inspect INCIDENT          what happened, which step, where the dump is
  hwerr-guard clear INCIDENT            end its QEMU, after the post-mortem
  hwerr-guard clear --degraded web1     its DIMM was replaced: count errors anew
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
    status.add_argument("--all", action="store_true", help="closed incidents, too")
    freeze = verbs.add_parser("freeze", help="freeze a VM now, or once more after a failure")
    freeze.add_argument("name", metavar="VM", help="its name, UUID or process number")
    verbs.add_parser("events", help="what happens from now on, one JSON object a line")
    inspect = verbs.add_parser("inspect", help="all that is known of an incident, as JSON")
    inspect.add_argument("name", metavar="INCIDENT")
    dump = verbs.add_parser("dump", help="dump a frozen VM's memory, now")
    dump.add_argument("name", metavar="INCIDENT|VM")
    clear = verbs.add_parser("clear", help="end a frozen VM's QEMU and close the incident")
    clear.add_argument("--degraded", action="store_true",
                       help="of a VM instead: it is not degraded any more")  # fmt: skip
    clear.add_argument("name", metavar="INCIDENT|VM")
    return p


# -- talking to the daemon -----------------------------------------------------


class NoDaemonError(GuardError):
    """Nobody listens."""


class NoAnswerError(GuardError):
    """The daemon runs and says nothing."""

    def __init__(self, limit: float | None) -> None:
        super().__init__(
            f"the daemon does not answer within {limit or 0:g} s: see its log; systemctl restart hwerr-guard"
        )


class Conversation:
    """One request; iterate over its lines, then look at `status`. `limit`: seconds for each answer."""

    def __init__(self, path: Path, request: dict[str, Any], limit: float | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(limit)
        self._limit = limit
        try:
            self._socket.connect(os.fspath(path))
        except PermissionError:
            raise GuardError(f"{path}: not permitted: run as root") from None
        except (BlockingIOError, TimeoutError):
            # So many wait already.
            raise NoAnswerError(limit) from None
        except OSError:
            raise NoDaemonError("the daemon does not run: systemctl start hwerr-guard") from None
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self.status = EXIT_ERROR

    def __iter__(self) -> Iterator[Any]:
        """GuardError for what the daemon refuses."""
        with self._socket, self._socket.makefile("rb") as lines:
            while line := self._line(lines):
                message = json.loads(line)
                if "line" in message:
                    yield message["line"]
                    continue
                self.status = message["end"]["status"]
                if message["end"]["error"]:
                    no_such = self.status == EXIT_NOTHING
                    raise (NoSuchError if no_such else GuardError)(message["end"]["error"])
                return
        raise GuardError("the daemon ended before it had answered")

    def _line(self, lines: IO[bytes]) -> bytes:
        try:
            return lines.readline()
        except TimeoutError:
            raise NoAnswerError(self._limit) from None
        except ConnectionError:
            return b""


def ask(policy: policies.Policy, verb: str, limit: float | None = None, **more: Any) -> tuple[list[Any], int]:
    """All lines, and the status."""
    conversation = Conversation(policy.run_dir / "control", {"verb": verb, **more}, limit)
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
        (form,), _ = ask(policy, "status", limit=_STATUS_WITHIN)
    except NoDaemonError as error:
        complain(PROG, str(error))
        form, code = _from_disk(policy), EXIT_NO_DAEMON
    except NoAnswerError as error:
        complain(PROG, f"{error}; this is what is on disk")
        form, code = _from_disk(policy), EXIT_NO_ANSWER
    if not args.all:
        form["incidents"] = [i for i in form["incidents"] if i.get("open", True) or i["id"] == args.name]
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


def _said(state: str, weaker: bool | None) -> str:
    if state != "frozen":
        return state
    return "FROZEN (weaker)" if weaker else "FROZEN"


# Of `status`, what is to be "ok", and what it means if it is not.
_ABLE = {
    "events": "no hardware errors are seen",
    "kernel_guard": "VMs are stopped by QEMU, after an error was read",
    "seal": "the seal is the weaker one, which root can take off",
    "network": "a guest with a network cannot be FROZEN",
}


def _status_lines(form: dict[str, Any]) -> Iterator[str]:
    for key, meaning in _ABLE.items():
        if form.get(key, "ok") != "ok":
            yield f"{meaning}: {form[key]}"
    if form.get("lost"):
        yield f"{form['lost']} records of errors were lost: the daemon was too slow to read them"
    for vm in form["vms"]:
        state = _said(vm["state"], vm.get("weaker"))
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
        state = _said(incident["state"], incident.get("weaker"))
        text = f"{incident['id']}  {state}: {incident['message']}"
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
            weaker = incident["steps"]["seal"]["state"] == "weaker"
            print(f"{incident['vm']} is {_said('frozen', weaker)}: incident {incident['id']}")
        return EXIT_OK
    failed = [f"{name}: {s['detail']}" for name, s in incident["steps"].items() if s["state"] == "failed"]
    why = "; ".join(failed + incident["notes"]) or f"it is {incident['state']}"
    complain(PROG, f"{incident['vm']} is not FROZEN ({incident['id']}): {why}")
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
    lines, status = ask(policy, "clear", name=args.name, degraded=args.degraded)
    with output():
        if args.degraded:
            print(f"{lines[0]['vm']} is not degraded any more")
            return status
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
    except CannotBeginError as error:
        complain(PROG, str(error))
        return EXIT_CANNOT_BEGIN
    except NoSuchError as error:
        complain(PROG, str(error))
        return EXIT_NOTHING
    except GuardError as error:
        complain(PROG, str(error))
        return EXIT_ERROR
