# SPDX-License-Identifier: MIT
"""The probe of hwerr-trace: bpf/trace.bcc.c, compiled by bcc for what is asked, and attached.

What is asked becomes -D flags (`flags`), so that what is not wanted is not even
compiled. Compiling takes seconds, minutes on an emulated machine, and cannot be interrupted:
it is done in a thread.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .bpf import OBJECTS, capable
from .enums import Severity, Source
from .tracepoint import KNOWN, Format, RawEvent, parse_format

__all__ = ["Missing", "NotPermitted", "Probe", "Wanted", "flags", "formats", "missing"]

SOURCE = OBJECTS / "trace.bcc.c"
TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
GROUPS = ("mce", "ras")
MODULES = Path("/lib/modules")

# linux/capability.h
_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39

# Pages of the ring buffer: a power of two. An event takes a little more than 1 KiB.
_RING_PAGES = 1024
_NAME_BYTES = 64
_OTHERS = 4

# kmod/classify.h, HWERR_MCE_*, by the words of /proc/cpuinfo.
_FACTS = {"smca": 0x04, "overflow_recov": 0x08, "succor": 0x10}


class Missing(Exception):
    """Something that has to be installed, mounted or loaded first; the message says what."""


class NotPermitted(Exception):
    """The caller, or anybody in this kernel, may not."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What passes the probe; None and empty: all.

    `bank`, `device` and `dimm` exclude each other: an event has one of them. `severity` is the
    least wanted, `pid` and `cpu` where the tracepoint was hit.
    """

    sources: frozenset[Source] = frozenset()
    severity: Severity | None = None
    bank: int | None = None
    device: str | None = None
    dimm: str | None = None
    pid: int | None = None
    cpu: int | None = None
    stacks: bool = False

    def event(self, name: str) -> bool:
        """Whether any event of that tracepoint can pass."""
        known = KNOWN.get(name)
        if known is None:
            # Of these nothing is known that could be compared.
            return not (self.sources or self.severity or self.bank is not None or self.device or self.dimm)
        if self.sources and known.source not in self.sources:
            return False
        if self.bank is not None and known.source != Source.MCE:
            return False
        if self.device is not None and known.source != Source.AER:
            return False
        return self.dimm is None or known.source == Source.EDAC


def _tracefs() -> Path:
    for path in TRACEFS:
        if (path / "events").is_dir():
            return path
    raise Missing(f"tracefs is not mounted: mount -t tracefs tracefs {TRACEFS[0]}")


def formats(wanted: Wanted) -> tuple[dict[int, Format], list[str]]:
    """(by number, the tracepoints that can pass; names of those this kernel has not now)."""
    events = _tracefs() / "events"
    names = [name for name in KNOWN if wanted.event(name)]
    names += sorted(
        f"{group}:{path.name}"
        for group in GROUPS
        for path in (events / group).glob("*")
        if path.is_dir() and f"{group}:{path.name}" not in KNOWN
    )
    found: dict[int, Format] = {}
    absent = []
    others = 0
    for name in names:
        if not wanted.event(name):
            continue
        if name not in KNOWN:
            others += 1
            if others > _OTHERS:
                continue
        try:
            text = (events / name.replace(":", "/") / "format").read_text("ascii", "replace")
            found[len(found) + 1] = parse_format(name, text)
        except FileNotFoundError:
            absent.append(name)
        except ValueError:
            pass  # one that says nothing but that it was hit
    # It is in one of two groups.
    if any(f.name.endswith(":memory_failure_event") for f in found.values()):
        absent = [name for name in absent if not name.endswith(":memory_failure_event")]
    return found, absent


def _functions(layouts: dict[int, Format]) -> dict[int, str]:
    """Name of the probe's function for each tracepoint; in capitals, of its macros."""
    out = {}
    others = 0
    for number, layout in layouts.items():
        if layout.name in KNOWN:
            out[number] = layout.name.partition(":")[2]
        else:
            out[number] = f"other_{others}"
            others += 1
    return out


def words(name: str) -> list[int]:
    """A string as the probe compares it: what it cuts is cut here too."""
    data = name.encode()[: _NAME_BYTES - 1].ljust(_NAME_BYTES, b"\0")
    return list(struct.unpack("<8Q", data))


def cpu_facts(cpuinfo: str) -> int:
    """HWERR_MCE_* of the CPU, from /proc/cpuinfo."""
    line = next((ln for ln in cpuinfo.splitlines() if ln.startswith("flags")), "")
    return sum(bit for word, bit in _FACTS.items() if word in line.split())


def flags(wanted: Wanted, layouts: dict[int, Format], facts: int = 0) -> list[str]:
    """The compiler's flags for it. Missing if an event has not the fields that a filter needs."""
    out = [f"-DRING_PAGES={_RING_PAGES}", f"-DMCE_FACTS={facts:#x}"]
    for number, function in _functions(layouts).items():
        layout = layouts[number]
        out.append(f"-DTRACE_{function.upper()}={number}")
        known = KNOWN.get(layout.name)
        for name in known.fields if known else ():
            offset = layout.offset(name)
            if offset is None:
                raise Missing(
                    f"this kernel's {layout.name} has no field {name}: a newer hwerr-trace is needed"
                )
            out.append(f"-D{function.upper()}_{name.upper()}={offset}")
        if function == "arm_event" and (offset := layout.offset("sev")) is not None:
            out.append(f"-DARM_EVENT_SEV={offset}")
    numbers = {"BANK": wanted.bank, "CPU": wanted.cpu, "PID": wanted.pid}
    if wanted.severity is not None and wanted.severity > min(Severity):
        numbers["SEVERITY"] = int(wanted.severity)
    out += [f"-DONLY_{name}={value}" for name, value in numbers.items() if value is not None]
    if (compared := wanted.device or wanted.dimm) is not None:
        out += [f"-DONLY_NAME_{n}={word:#x}ULL" for n, word in enumerate(words(compared))]
    if wanted.stacks:
        out.append("-DSTACKS")
    return out


# -- what it takes -----------------------------------------------------------


def _headers() -> None:
    """Missing unless bcc will find the kernel's headers: it looks at the same places."""
    release = platform.release()
    if source := os.environ.get("BCC_KERNEL_SOURCE"):
        if not Path(source).is_dir():
            raise Missing(f"BCC_KERNEL_SOURCE names {source}, which is no directory")
        return
    modules = MODULES / release
    if (modules / "build").is_dir():
        return
    kheaders = (Path("/sys/kernel/kheaders.tar.xz"), Path("/proc/kheaders.tar.xz"))
    if any(p.exists() for p in kheaders) or any(modules.glob("kernel/kernel/kheaders.ko*")):
        return
    raise Missing(
        f"bcc needs the headers of this kernel, and {modules}/build is not there: "
        f"apt-get install linux-headers-{release}"
    )


def missing() -> None:
    """Missing or NotPermitted if the probe cannot be had here, as far as can be told without compiling it."""
    if not SOURCE.exists():
        raise Missing("the package has no BPF sources: run scripts/build-bpf, then install it again")
    try:
        import bcc  # noqa: F401
    except (ImportError, OSError) as error:
        raise Missing(f"bcc is not there: apt-get install python3-bpfcc ({error})") from None
    if not capable(_CAP_SYS_ADMIN) and not capable(_CAP_BPF, _CAP_PERFMON):
        raise NotPermitted("not permitted: run as root")
    try:
        _tracefs()
    except PermissionError:
        raise NotPermitted("tracefs may not be read: run as root") from None
    _headers()


# -- the probe ---------------------------------------------------------------


@contextmanager
def _compiler_silent(said: Path) -> Iterator[None]:
    """What clang says on file descriptor 2 goes into a file; Python's own stderr goes on."""
    kept, before = os.dup(2), sys.stderr
    with said.open("wb") as file:
        sys.stderr = os.fdopen(os.dup(kept), "w", buffering=1, errors="backslashreplace")
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        ours, sys.stderr = sys.stderr, before
        ours.close()


def _reason(error: BaseException, said: str) -> str:
    """One line of what bcc and the compiler say."""
    errors = [line.strip() for line in said.splitlines() if "error:" in line]
    rest = [line.strip() for line in said.splitlines() if line.strip() and "warning:" not in line]
    return (errors or rest[-1:] or [str(error)])[0]


class Probe:
    """The probe, compiled and attached. A context manager; closing it takes it out of the kernel."""

    def __init__(
        self, wanted: Wanted, layouts: dict[int, Format], progress: Callable[[float], None] = lambda s: None
    ) -> None:
        """Blocks while it is compiled; `progress` gets the seconds it took so far, every ten of them.

        Missing or NotPermitted if it cannot be had. An exception of `progress`, or KeyboardInterrupt, passes
        at once, and leaves the compiler running: end the process by os._exit() then.
        """
        self._layouts = layouts
        self._data: list[bytes] = []
        self._bpf: Any = None
        facts = cpu_facts(Path("/proc/cpuinfo").read_text("utf-8", "replace"))
        arguments = [f"-I{SOURCE.parent}", *flags(wanted, layouts, facts)]
        with tempfile.TemporaryDirectory(prefix="hwerr-trace-") as scratch:
            said = Path(scratch, "said")
            try:
                with _compiler_silent(said):
                    self._bpf = self._compile(arguments, progress)
                    self._attach()
            except Exception as error:
                self.close()
                text = said.read_text("utf-8", "replace")
                # bcc has one kind of exception, and the kernel's reason only in words.
                if any(word in f"{error} {text}" for word in ("Operation not permitted", "super-user")):
                    raise NotPermitted(
                        "the kernel refused the probe: run as root; if that was so, the kernel is "
                        "locked down (see /sys/kernel/security/lockdown)"
                    ) from None
                raise Missing(f"bcc cannot make the probe here: {_reason(error, text)}") from None
        self._ring = self._bpf["events"]
        self._ring.open_ring_buffer(self._take)

    def _compile(self, arguments: list[str], progress: Callable[[float], None]) -> Any:
        from bcc import BPF

        done: list[Any] = []

        def work() -> None:
            try:
                done.append(BPF(text=SOURCE.read_bytes(), cflags=arguments))
            except BaseException as error:
                done.append(error)

        start = time.monotonic()
        thread = threading.Thread(target=work, daemon=True, name="compile")
        thread.start()
        while True:
            thread.join(10)
            if not thread.is_alive():
                break
            progress(time.monotonic() - start)
        if isinstance(done[0], BaseException):
            raise done[0]
        return done[0]

    def _attach(self) -> None:
        for number, function in _functions(self._layouts).items():
            name = self._layouts[number].name
            self._bpf.attach_tracepoint(tp=name.encode(), fn_name=f"trace_{function}".encode())

    def _take(self, context: Any, data: Any, size: int) -> int:
        # Bytes: bcc's own event() ends the process at a type it does not know.
        self._data.append(ctypes.string_at(data, size))
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """A second time does nothing."""
        if self._bpf is not None:
            bpf, self._bpf = self._bpf, None
            bpf.cleanup()

    def fileno(self) -> int:
        """Readable means that `read` has something."""
        fd: int = self._ring.map_fd
        return fd

    def read(self) -> list[RawEvent]:
        """What has come; [] if nothing has."""
        self._bpf.ring_buffer_consume()
        data, self._data = self._data, []
        return [RawEvent.parse(d, self._layouts) for d in data]

    def lost(self) -> int:
        """Events that found no room, since the start."""
        return int(self._bpf["lost"][ctypes.c_int(0)].value)

    def stack(self, number: int) -> list[str]:
        """Functions of a stack, innermost first; [] if it was not kept."""
        if number < 0:
            return []
        addresses: Iterable[int] = self._bpf["stacks"].walk(number)
        return [self._bpf.ksym(a, show_offset=True).decode("ascii", "replace") for a in addresses]
