# SPDX-License-Identifier: MIT
"""Boots a test VM and runs a command in it, on the same checkout, as root.

virtme-ng finds the modules a kernel needs to mount the host's root file system
and makes the initramfs; the QEMU command line is put together here, because a
boot through the PVH entry, a cached root and no udev take a sixth of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from . import splat

TREE = Path(__file__).resolve().parents[3]
GUEST = TREE / "tests/vm/guest"
CACHE = Path(os.environ.get("HWERR_CACHE") or Path.home() / ".cache" / "hwerr")
RUNS = TREE / "build/vm"
KEEP_RUNS = 20
# A boot that the emulator lets hang before anything of ours runs is made once more: after so
# many seconds, many times what it takes, and more on the kernels that find faults.
HANGS_AFTER, DEBUG_HANGS_AFTER = 150, 600
BUILT = ("debug", "kcsan")
NOT_UP = "did not come up"
# How long a QEMU that closed its ports may take to end, seconds.
ENDS_WITHIN = 30

EXIT_USAGE = 64
EXIT_SETUP = 69
EXIT_SPLAT = 70
EXIT_LOST = 71

STATUS_HELP = f"""\
exit status:
  the COMMAND's own status, or
  {EXIT_USAGE}  wrong usage
  {EXIT_SETUP}  the VM could not be set up: no such kernel in the cache, a module that
      does not build or load
  {EXIT_SPLAT}  kernel splat: a WARN, BUG, Oops, lockdep, KASAN, UBSAN, kmemleak, hung task
      or stall report on the console, or a taint that only these leave; whatever
      the COMMAND's status was
  {EXIT_LOST}  lost VM: it never came up, panicked, died, or did not end in time
  130 interrupted
A COMMAND with one of these statuses is told apart by the last line on stderr.

The VM: q35, two CPUs, the host's root file system read-only, this checkout
read-write at the same path and current directory. `.venv/bin` and tests/vm/bin
(hwerr-inject, testguest) are on PATH, tests/vm on PYTHONPATH. On the PCI bus, behind a root
port, is a virtio-rng with AER (QEMU id aer0; a second one, aer1, behind its own);
an IOMMU lets a nested guest have them (testguest start --vfio aer0).
/tmp, /run, /var/tmp, /var/log and /var/cache are empty and in memory.
In the environment: HWERR_VM_CPU, HWERR_KO and HWERR_SIM_KO (module paths),
and every HWERR_*, PYTEST_ADDOPTS, NO_COLOR, FORCE_COLOR, COLUMNS, CI of the caller.
hwerr.ko is loaded unless --no-module is given; hwerr_sim.ko only with --sim (a test
may load it: insmod $HWERR_SIM_KO).

examples:
  tests/vm/run -- uname -a
  tests/vm/run --kernel 6.12 --cpu intel -- hwerr-inject mce-real --bank 9 \\
      --status 0xbd000000000000c0 --addr 0x10000000 --misc 0x8c --mcgstatus 0x5
"""


class RunError(Exception):
    """The run ends with `status`; the message says why and what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Kernel:
    """A kernel of the cache, as scripts/kernel describes it."""

    version: str
    release: str
    image: Path
    bzimage: Path
    moddir: Path

    @classmethod
    def find(cls, version: str) -> Kernel:
        """Look it up; RunError if it is not there."""

        def ask(verb: str) -> str:
            done = subprocess.run(
                [TREE / "scripts/kernel", verb, version], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RunError(EXIT_SETUP, done.stderr.strip().removeprefix("kernel: "))
            return done.stdout.strip()

        return cls(version, ask("release"), Path(ask("path")), Path(ask("bzimage")), Path(ask("moddir")))


@dataclass
class Outcome:
    """What came of a run."""

    up: float | None = None
    ready: float | None = None
    status: int | None = None
    taint: int = 0
    failure: str | None = None
    lost: str | None = None
    console: list[str] = field(default_factory=list)


class Progress:
    """Lines on stderr about what takes time."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        if not self.quiet:
            self.always(text)

    def always(self, text: str) -> None:
        sys.stderr.write(f"vm: {text}\n")
        sys.stderr.flush()


# -- preparation -----------------------------------------------------------


def build_modules(version: str, sim_only: bool) -> dict[str, Path]:
    """Build what the VM loads: {"hwerr": path, "hwerr_sim": path}, as far as the sources exist."""
    argv = [str(TREE / "scripts/build-module"), *(["--sim-only"] if sim_only else []), version]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RunError(EXIT_SETUP, f"`scripts/build-module {version}` failed ({done.returncode}), see above")
    return {Path(p).stem: Path(p) for p in done.stdout.split()}


def build_bpf() -> None:
    """Compile the BPF programs, where they are older than their sources."""
    if subprocess.run([TREE / "scripts/build-bpf"], stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise RunError(EXIT_SETUP, "`scripts/build-bpf` failed, see above")


def initramfs(kernel: Kernel) -> Path:
    """virtme-ng's initramfs with our /init laid over it; made once for a kernel and a virtme-ng."""
    virtme = shutil.which("virtme-run", path=f"{TREE}/.venv/bin:{os.environ.get('PATH', '')}")
    if virtme is None:
        raise RunError(EXIT_SETUP, "virtme-ng is not installed in .venv: run scripts/setup")
    init = GUEST / "initramfs-init"
    out = CACHE / "initramfs" / f"{kernel.release}.cpio"
    inputs = [init, kernel.image, Path(virtme), Path(__file__)]
    if out.exists() and all(out.stat().st_mtime > p.stat().st_mtime for p in inputs):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(f".{os.getpid()}")
    part.unlink(missing_ok=True)
    argv = [
        virtme, "--kimg", str(kernel.bzimage), "--mods", "auto", "--disable-kvm", "--force-9p",
        "--force-initramfs", "--disable-microvm", "--script-sh", "true", "--dry-run",
        "--save-initramfs", str(part),
    ]  # fmt: skip
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not part.exists():
        raise RunError(EXIT_SETUP, f"virtme-run made no initramfs: {done.stderr.strip()}")
    # A later archive's file replaces an earlier one's (Documentation/driver-api/early-userspace).
    with part.open("ab") as archive:
        archive.write(b"\0" * (-archive.tell() % 512))
        archive.write(cpio_file("init", init.read_bytes(), 0o100755))
    part.rename(out)
    return out


def cpio_file(name: str, body: bytes, mode: int) -> bytes:
    """A newc archive of one file."""

    def entry(ino: int, mode: int, name: str, body: bytes) -> bytes:
        fields = (ino, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
        return head + b"\0" * (-len(head) % 4) + body + b"\0" * (-len(body) % 4)

    return entry(1, mode, name, body) + entry(0, 0, "TRAILER!!!", b"")


def new_run_dir(version: str) -> Path:
    """A directory for this run's console log and command; old ones are removed."""
    RUNS.mkdir(parents=True, exist_ok=True)
    old = sorted((p for p in RUNS.iterdir() if p.is_dir()), key=lambda p: p.name)
    for path in old[: -KEEP_RUNS or None]:
        if not (path / "running").exists() or not process_lives(path / "running"):
            shutil.rmtree(path, ignore_errors=True)
    run = RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{version}-{os.getpid()}"
    run.mkdir()
    (run / "running").write_text(f"{os.getpid()}\n", encoding="ascii")
    return run


def process_lives(pidfile: Path) -> bool:
    try:
        os.kill(int(pidfile.read_text(encoding="ascii")), 0)
    except (OSError, ValueError):
        return False
    return True


def write_command(run: Path, args: argparse.Namespace, modules: dict[str, Path]) -> Path:
    """The script that the guest's init runs."""
    cwd = Path.cwd()
    if not cwd.is_relative_to(TREE):
        cwd = TREE
    passed = ("PYTEST_ADDOPTS", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "CI", "LANG", "SOURCE_DATE_EPOCH")
    env = {k: v for k, v in os.environ.items() if k in passed or k.startswith("HWERR_")}
    env |= dict(e.split("=", 1) for e in args.env)
    env["HWERR_VM_CPU"] = args.cpu
    env["HWERR_KERNEL"] = args.kernel
    env["HWERR_RUN_DIR"] = str(run)
    if "hwerr" in modules:
        env["HWERR_KO"] = str(modules["hwerr"])
    if "hwerr_sim" in modules:
        env["HWERR_SIM_KO"] = str(modules["hwerr_sim"])
    script = run / "command"
    script.write_text(
        "".join(f"export {k}={shlex.quote(v)}\n" for k, v in sorted(env.items()))
        + f"export PATH={TREE}/.venv/bin:{TREE}/tests/vm/bin:$PATH\n"
        + f"export PYTHONPATH={TREE}/tests/vm:{TREE}\n"
        + f"cd {shlex.quote(str(cwd))} && exec {shlex.join(args.command)}\n",
        encoding="utf-8",
    )
    return script


# -- the machine -----------------------------------------------------------


def qemu_command(
    args: argparse.Namespace, kernel: Kernel, initrd: Path, run: Path, words: list[str], fds: dict[str, int]
) -> list[str]:
    """The command line. `fds`: the file descriptors QEMU inherits, by port name."""
    cpu = {"amd": "max", "intel": "max,vendor=GenuineIntel"}[args.cpu]
    machine = "q35"
    devices: list[str] = []
    if not args.no_iommu:
        machine += ",kernel-irqchip=split"
        devices += ["-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"]
        words = [*words, "intel_iommu=on", "iommu=pt"]
    argv = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-name", f"hwerr-{args.kernel}-{args.cpu},debug-threads=on",
        "-machine", machine,
        "-accel", "kvm" if args.accel == "kvm" else f"tcg,thread={'single' if args.one_thread else 'multi'}",
        "-cpu", cpu, "-m", args.mem, "-smp", str(args.smp),
        "-kernel", str(kernel.image), "-initrd", str(initrd),
        "-chardev", f"file,id=console,path={run}/console.log", "-serial", "chardev:console",
        *devices,
    ]  # fmt: skip
    for tag, path, readonly in (("root", "/", True), ("tree", str(TREE), False)):
        argv += [
            "-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap"
            + (",readonly=on" if readonly else ""),
            "-device", f"virtio-9p-pci,fsdev={tag},mount_tag=hwerr.{tag}",
        ]  # fmt: skip
    argv += ["-device", "virtio-serial-pci,id=ports"]
    for port in ("control", "stdout", "stderr", "monitor"):
        argv += [
            "-chardev", f"socket,id={port},fd={fds[port]}",
            "-device", f"virtserialport,bus=ports.0,chardev={port},name=org.hwerr.{port}",
        ]  # fmt: skip
    # QEMU talks to itself: its QMP monitor's other end is a port of the guest.
    argv += ["-chardev", f"socket,id=qmp,fd={fds['qmp']}", "-mon", "chardev=qmp,mode=control"]
    argv += ["-chardev", f"socket,id=nmi,fd={fds['nmi']}", "-mon", "chardev=nmi,mode=control"]
    iommu = "" if args.no_iommu else ",iommu_platform=on,ats=on"
    for n in range(2):
        argv += [
            "-device", f"pcie-root-port,id=rp{n},chassis={n + 1},slot={n + 1}",
            "-device", f"virtio-rng-pci,id=aer{n},bus=rp{n},aer=on,disable-legacy=on{iommu}",
        ]  # fmt: skip
    argv += ["-append", " ".join(words), *args.qemu_opts]
    return argv


def kernel_words(args: argparse.Namespace, kernel: Kernel, script: Path, insmod: list[Path]) -> list[str]:
    """The kernel command line."""
    words = [
        "console=ttyS0", "loglevel=7", "panic=-1", "nokaslr",
        # An emulated CPU on a busy host is slow, not hung.
        "rcupdate.rcu_cpu_stall_timeout=120", "watchdog_thresh=60", "tsc=reliable", "no_timer_check",
        "psmouse.proto=exps", "raid=noautodetect",
        # See ask_where(): where each CPU is. A list of all tasks would wait for locks of a stopped CPU.
        "unknown_nmi_panic", "panic_print=0x40",
        # The emulated CPU has none of the holes, and pays dearly for closing them.
        "mitigations=off",
    ]  # fmt: skip
    values = {
        "init": GUEST / "init",
        "tree": TREE,
        "cache": CACHE,
        "moddir": kernel.moddir,
        "command": script,
        "insmod": ",".join(str(p) for p in insmod),
        "hostname": args.hostname,
    }
    words += [f"hwerr.{k}={v}" for k, v in values.items() if str(v)]
    for word in words:
        if " " in word:
            raise RunError(EXIT_SETUP, f"a path with a blank cannot be given to the VM: {word.split('=')[1]}")
    return [*words, *shlex.split(args.append)]


def boot(
    args: argparse.Namespace, kernel: Kernel, run: Path, words: list[str], initrd: Path, progress: Progress,
    hangs_after: float,
) -> Outcome:  # fmt: skip
    """Start the VM and stay with it to its end, or until it hangs before it is up."""
    ours: dict[str, socket.socket] = {}
    theirs: dict[str, socket.socket] = {}
    for port in ("control", "stdout", "stderr", "nmi"):
        ours[port], theirs[port] = socket.socketpair()
    nmi = ours.pop("nmi")
    theirs["monitor"], theirs["qmp"] = socket.socketpair()
    fds = {name: sock.fileno() for name, sock in theirs.items()}
    argv = qemu_command(args, kernel, initrd, run, words, fds)
    (run / "qemu").write_text(shlex.join(argv) + "\n", encoding="utf-8")
    if args.show_command:
        progress.always(shlex.join(argv))
    with (run / "qemu.log").open("w") as log:
        try:
            qemu = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=tuple(fds.values()),
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            raise RunError(EXIT_SETUP, "qemu-system-x86_64 is not installed: run scripts/setup") from None
    for sock in theirs.values():
        sock.close()
    try:
        return follow(args, qemu, ours, nmi, run, progress, hangs_after)
    finally:
        if qemu.poll() is None:
            qemu.kill()
        qemu.wait()
        for sock in (*ours.values(), nmi):
            sock.close()


def follow(
    args: argparse.Namespace,
    qemu: subprocess.Popen[bytes],
    ports: dict[str, socket.socket],
    nmi: socket.socket,
    run: Path,
    progress: Progress,
    hangs_after: float,
) -> Outcome:
    outcome = Outcome()
    started = time.monotonic()
    deadline = started + min(hangs_after, args.boot_timeout)
    # Of the command, from its start on.
    heard = float("inf")
    looks, cpu = started + args.looks_every, None
    streams: dict[str, IO[bytes]] = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    pending = b""
    with selectors.DefaultSelector() as selector:
        for name, sock in ports.items():
            selector.register(sock, selectors.EVENT_READ, name)
        while selector.get_map():
            now = time.monotonic()
            if now > looks:
                looks = now + args.looks_every
                cpu, before = splat.deaf_cpu((run / "console.log").read_text("utf-8", "replace")), cpu
                if cpu is not None and cpu == before:
                    outcome.lost = f"CPU {cpu} takes no interrupts"
                    break
            left = min(deadline, heard + args.silence) - now
            if left <= 0:
                if outcome.ready is None:
                    outcome.lost = f"{NOT_UP} within {now - started:.0f} s"
                elif now >= deadline:
                    outcome.lost = f"the command did not end within {args.timeout:.0f} s"
                else:
                    outcome.lost = f"the command wrote nothing for {args.silence:.0f} s"
                ask_where(qemu, nmi, progress)
                break
            for key, _ in selector.select(min(left, args.looks_every)):
                port = ports[key.data]
                try:
                    data = port.recv(1 << 16)
                except ConnectionResetError:
                    data = b""
                if not data:
                    selector.unregister(port)
                elif key.data in streams:
                    heard = time.monotonic()
                    stream = streams[key.data]
                    stream.write(data)
                    stream.flush()
                else:
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        word, _, rest = line.decode(errors="replace").partition(" ")
                        now = time.monotonic() - started
                        match word:
                            case "up":
                                outcome.up = now
                                deadline = started + args.boot_timeout
                            case "ready":
                                outcome.ready = now
                                heard = time.monotonic()
                                deadline = heard + args.timeout
                                progress(f"up after {now:.1f} s")
                            case "taint":
                                outcome.taint = int(rest)
                            case "exit":
                                outcome.status = int(rest)
                            case "fail":
                                outcome.failure = rest
            if outcome.status is not None or outcome.failure is not None:
                # Everything the command wrote was sent before this word; the sockets hold it.
                qemu.terminate()
    # Its ports are closed a moment before it has ended, and its status says how.
    if outcome.lost is None:
        with suppress(subprocess.TimeoutExpired):
            qemu.wait(ENDS_WITHIN)
    if qemu.poll() is None:
        qemu.kill()
    qemu.wait()
    outcome.console = (run / "console.log").read_text("utf-8", errors="replace").splitlines()
    if outcome.status is None and outcome.failure is None and outcome.lost is None:
        said = (run / "qemu.log").read_text("utf-8", errors="replace").strip()
        panic = next((splat.strip_stamp(ln) for ln in outcome.console if "Kernel panic" in ln), None)
        ended = f"QEMU ended ({qemu.returncode})" + (f": {said}" if said else "")
        phase = "before it was up" if outcome.ready is None else "while the command ran"
        outcome.lost = f"{panic or ended} {phase}"
    return outcome


def ask_where(qemu: subprocess.Popen[bytes], nmi: socket.socket, progress: Progress) -> None:
    """Have a kernel that hangs say on its console where every CPU is: it panics on an NMI."""
    progress.always("asking the kernel where it is")
    nmi.sendall(b'{"execute": "qmp_capabilities"}\n{"execute": "inject-nmi"}\n')
    try:
        qemu.wait(60)
    except subprocess.TimeoutExpired:
        progress.always("it does not answer")
        nmi.setblocking(False)
        said = b""
        with suppress(BlockingIOError):
            while data := nmi.recv(1 << 16):
                said += data
        if said.count(b'"return"') < 2:
            progress.always("nor does the emulator")


# -- the verdict -----------------------------------------------------------


def judge(args: argparse.Namespace, outcome: Outcome, run: Path, progress: Progress) -> int:
    """Say what went wrong, and return the exit status."""
    splats = splat.find_splats(outcome.console, args.allow_splat)
    for text in splats[:3]:
        progress.always("kernel splat:")
        sys.stderr.write("".join(f"    {line}\n" for line in text.splitlines()))
    if len(splats) > 3:
        progress.always(f"and {len(splats) - 3} more")
    where = f"console: {run}/console.log"
    if outcome.failure is not None:
        progress.always(f"the VM could not be set up: {outcome.failure}; {where}")
        return EXIT_SETUP
    if outcome.lost is not None:
        if not splats:
            progress.always("last lines of the console:")
            sys.stderr.write("".join(f"    {line}\n" for line in outcome.console[-15:]))
        progress.always(f"lost VM: {outcome.lost}; {where}")
        return EXIT_LOST
    assert outcome.status is not None
    taints = [] if args.allow_splat else splat.taint_names(outcome.taint)
    if splats or taints:
        what = f"{len(splats)} kernel splat(s)" if splats else f"kernel tainted by: {', '.join(taints)}"
        progress.always(f"{what}; the command's status was {outcome.status}; {where}")
        return EXIT_SPLAT
    if outcome.status != 0:
        progress.always(f"the command ended with status {outcome.status}; {where}")
    return outcome.status


# -- command line ----------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        sys.stderr.write(f"{self.prog}: {message}\n")
        sys.exit(EXIT_USAGE)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    own, command = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    parser = Parser(
        prog="tests/vm/run",
        usage="tests/vm/run [OPTION...] -- COMMAND [ARGUMENT...]",
        description="Boot a test VM, run COMMAND in it as root on this checkout, forward output and status.",
        epilog=STATUS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--kernel", default="6.1", metavar="VER", help="one of `scripts/kernel list` (default: %(default)s)")
    add("--cpu", choices=("amd", "intel"), default="amd",
        help="amd: nested KVM works; intel: takes real machine checks (default: %(default)s)")  # fmt: skip
    add("--mem", metavar="SIZE", help="memory (default: 3G; 4G for the debug kernel)")
    add("--smp", type=int, default=2, metavar="N", help="CPUs (default: %(default)s)")
    add("--timeout", type=float, default=1800, metavar="S",
        help="time for COMMAND; the VM is lost after it (default: %(default)g s)")  # fmt: skip
    add("--silence", type=float, default=float("inf"), metavar="S",
        help="the VM is lost, too, when COMMAND writes nothing for so long (default: no limit)")  # fmt: skip
    add(
        "--boot-timeout",
        type=float,
        metavar="S",
        help="time to boot (default: 300 s; 900 s for the debug kernel)",
    )
    add("--no-module", action="store_true", help="do not build and load hwerr.ko")
    add("--sim", action="store_true", help="load the test-only hwerr_sim.ko too")
    add("--no-iommu", action="store_true", help="leave out the IOMMU that lets a nested guest have a device")
    add("--accel", choices=("tcg", "kvm"), default="tcg",
        help="kvm only on request: a /dev/kvm that opens need not work (default: %(default)s)")  # fmt: skip
    add(
        "--one-thread",
        action="store_true",
        help="emulate all CPUs in turn: slower, and without the races of an emulator of many threads",
    )
    add("--append", default="", metavar="WORDS", help="more words for the kernel command line")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for COMMAND; repeatable")
    add("--allow-splat", action="append", default=[], metavar="REGEX",
        help="a splat with such a line is no failure, and taint is not looked at; repeatable")  # fmt: skip
    # At the console: an NMI is answered sooner than that.
    add("--looks-every", type=float, default=60.0, help=argparse.SUPPRESS)
    add("--hostname", default="hwerr-vm", metavar="NAME", help=argparse.SUPPRESS)
    add("--quiet", action="store_true", help="no progress on stderr")
    add("--show-command", action="store_true", help="print QEMU's command line")
    add("--qemu-opts", nargs=argparse.REMAINDER, default=[], metavar="OPT",
        help="everything up to `--` goes to QEMU; give it last")  # fmt: skip
    args = parser.parse_args(own)
    if not command:
        parser.error("no COMMAND; write it after `--`")
    if any("=" not in e for e in args.env):
        parser.error("--env wants NAME=VALUE")
    args.command = command
    debug = args.kernel in BUILT
    args.mem = args.mem or ("4G" if debug else "3G")
    args.boot_timeout = args.boot_timeout or (900 if debug else 300)
    return args


def run(args: argparse.Namespace) -> int:
    progress = Progress(args.quiet)
    kernel = Kernel.find(args.kernel)
    progress(f"building modules for {args.kernel}")
    modules = build_modules(args.kernel, sim_only=args.no_module)
    build_bpf()
    insmod = []
    if not args.no_module:
        if "hwerr" not in modules:
            raise RunError(EXIT_SETUP, "kmod/ builds no hwerr.ko; use --no-module to run without")
        insmod.append(modules["hwerr"])
    if args.sim:
        insmod.append(modules["hwerr_sim"])
    initrd = initramfs(kernel)
    directory = new_run_dir(args.kernel)
    try:
        script = write_command(directory, args, modules)
        words = kernel_words(args, kernel, script, insmod)
        progress(f"booting {kernel.release} ({args.cpu}, {args.mem}, {args.smp} CPUs, {args.accel})")
        hangs_after = DEBUG_HANGS_AFTER if args.kernel in BUILT else HANGS_AFTER
        outcome = boot(args, kernel, directory, words, initrd, progress, hangs_after)
        if outcome.up is None and outcome.lost is not None and outcome.lost.startswith(NOT_UP):
            progress.always(f"{outcome.lost}: once more")
            (directory / "console.log").rename(directory / "console-1.log")
            outcome = boot(args, kernel, directory, words, initrd, progress, args.boot_timeout)
        status = judge(args, outcome, directory, progress)
    finally:
        (directory / "running").unlink(missing_ok=True)
    times = {"up_s": outcome.up, "ready_s": outcome.ready, "status": outcome.status, "verdict": status}
    (directory / "outcome.json").write_text(json.dumps(times) + "\n", encoding="ascii")
    return status


def main(argv: Sequence[str]) -> int:
    """Entry point of tests/vm/run."""
    args = parse(argv)
    # A terminated runner must take its VM with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(args)
    except RunError as error:
        sys.stderr.write(f"vm: {error}\n")
        return error.status
    except KeyboardInterrupt:
        sys.stderr.write("vm: interrupted\n")
        return 130
