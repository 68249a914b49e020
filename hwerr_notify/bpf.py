# SPDX-License-Identifier: MIT
"""BPF objects, and the seal: an LSM program that refuses KVM_RUN to chosen processes.

What is loaded stays in the kernel by its pins below /sys/fs/bpf/hwerr, whatever
becomes of the process that loaded it. The compiled programs are in this package
(`_bpf/`); libbpf is called through an extension that the package can be built
without, so nothing here may be imported by what has to work without BPF.

Nothing here is for several threads at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = [
    "PIN_DIR", "BpfError", "BpfObject", "Map", "Ring", "Seal", "SealState", "capable", "locked",
    "module_offers", "start_of", "unavailable", "unreadable",
]  # fmt: skip

PIN_DIR = Path("/sys/fs/bpf/hwerr")
OBJECTS = Path(__file__).resolve().parent / "_bpf"
LOCKDOWN = Path("/sys/kernel/security/lockdown")

# linux/kvm.h, linux/capability.h
_KVM_RUN = 0xAE80
_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39

# What the seal compares starts in: USER_HZ, that of /proc/PID/stat.
_NSEC_PER_TICK = 10_000_000

_KEY_SIZE, _SEAL_SIZE = 4, 16


class BpfError(OSError):
    """The kernel or libbpf refused; the message says what and, where known, why."""


def _library() -> tuple[Any, Any]:
    """(ffi, lib) of the extension. BpfError if the package was built without it."""
    try:
        from ._libbpf import ffi, lib
    except ImportError as error:
        raise BpfError(
            errno.ENOSYS,
            "the package was built without libbpf: apt-get install libbpf-dev clang llvm bpftool, "
            f"then install it again ({error})",
        ) from None
    lib.hwerr_libbpf_quiet()
    return ffi, lib


def _failed(lib: Any, ffi: Any, what: str) -> BpfError:
    """The error that errno and libbpf's messages describe, in one line."""
    code = ffi.errno
    said = ffi.string(lib.hwerr_libbpf_said()).decode("utf-8", "replace")
    lines = [line.removeprefix("libbpf: ").strip() for line in said.splitlines()]
    # The verifier's own reason comes last but for its statistics and libbpf's summaries.
    noise = re.compile(r"^$|^processed \d|failed to load|PROG LOAD LOG|^--|perform CO-RE")
    reasons = [line for line in lines if not noise.search(line)]
    detail = f" ({reasons[-1]})" if reasons else ""
    return BpfError(code, f"{what}: {os.strerror(code)}{detail}")


def capable(*capabilities: int) -> bool:
    """Whether this process has all of them in effect."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                have = int(line.split()[1], 16)
                return all(have >> c & 1 for c in capabilities)
    return False


def kernel_has_type(name: str) -> bool:
    """Whether the kernel's own BTF has a function, type or member of that name."""
    return b"\0" + name.encode() + b"\0" in Path("/sys/kernel/btf/vmlinux").read_bytes()


def module_offers(module: str, function: str) -> bool:
    """Whether a loaded module describes, by its BTF, a function of that name."""
    try:
        return b"\0" + function.encode() + b"\0" in Path("/sys/kernel/btf", module).read_bytes()
    except OSError:
        return False


def unavailable(pin_dir: Path | None = PIN_DIR) -> str | None:
    """None if BPF programs can be loaded here as far as can be told without doing it, else why not.

    And pinned below `pin_dir`, unless that is None.
    """
    try:
        _, lib = _library()
    except BpfError as error:
        return str(error.strerror)
    if not any(OBJECTS.glob("*.bpf.o")):
        return "the package was built without its BPF programs: run scripts/build-bpf, then install it again"
    if not capable(_CAP_SYS_ADMIN) and not capable(_CAP_BPF, _CAP_PERFMON):
        return "not permitted: run as root (CAP_BPF and CAP_PERFMON)"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "this kernel describes no types (CONFIG_DEBUG_INFO_BTF is off)"
    if pin_dir and not lib.hwerr_is_bpf_fs(os.fsencode(pin_dir.parent)):
        return f"{pin_dir.parent} is not a BPF file system: mount -t bpf bpf {pin_dir.parent}"
    return None


def unreadable() -> str | None:
    """None if BPF programs may read the kernel's memory here, as the probes do, else why not."""
    try:
        lockdown = LOCKDOWN.read_text("ascii")
    except OSError:
        return None
    if "[confidentiality]" in lockdown:
        return "lockdown=confidentiality keeps BPF programs from reading the kernel's memory"
    return None


class _Descriptor:
    """Something of BPF's by file descriptor, which it owns. A context manager."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._ffi, self._lib = _library()

    @classmethod
    def _open(cls, call: str, path: Path) -> Self:
        """By a function of the library that takes a path. FileNotFoundError if nothing is pinned there."""
        ffi, lib = _library()
        fd = getattr(lib, call)(os.fsencode(path))
        if fd < 0:
            # OSError makes the subclass that the number calls for.
            raise OSError(ffi.errno, os.strerror(ffi.errno), str(path))
        return cls(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Program(_Descriptor):
    """A BPF program."""

    @classmethod
    def of_link(cls, path: Path) -> Self:
        """That which a pinned link runs. FileNotFoundError if there is none; takes CAP_SYS_ADMIN."""
        return cls._open("hwerr_link_program", path)

    def misses(self) -> int:
        """Runs that the kernel left out, because it ran on that CPU already."""
        found = int(self._lib.hwerr_program_misses(self.fd))
        if found < 0:
            raise _failed(self._lib, self._ffi, "a program's description")
        return found


class Map(_Descriptor):
    """A BPF map: bytes to bytes."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        shape = self._ffi.new("uint32_t[4]")
        if self._lib.hwerr_map_shape(fd, shape) != 0:
            raise _failed(self._lib, self._ffi, "a map's description")
        self.type, self.key_size, self.value_size, self.max_entries = shape

    @classmethod
    def pinned(cls, path: Path) -> Self:
        """FileNotFoundError if nothing is pinned there."""
        return cls._open("bpf_obj_get", path)

    def __getitem__(self, key: bytes) -> bytes:
        value = self._ffi.new("char[]", self.value_size)
        if self._lib.bpf_map_lookup_elem(self.fd, key, value) != 0:
            if self._ffi.errno == errno.ENOENT:
                raise KeyError(key)
            raise _failed(self._lib, self._ffi, "reading a map")
        return bytes(self._ffi.buffer(value))

    def set(self, key: bytes, value: bytes, *, new: bool = False) -> None:
        """FileExistsError if `new` and it is there; BpfError with E2BIG if the map is full."""
        flags = self._lib.BPF_NOEXIST if new else self._lib.BPF_ANY
        if self._lib.bpf_map_update_elem(self.fd, key, value, flags) != 0:
            if self._ffi.errno == errno.EEXIST:
                raise FileExistsError(errno.EEXIST, "the map has this key")
            raise _failed(self._lib, self._ffi, "writing a map")

    def discard(self, key: bytes) -> None:
        """Removes the key, if it is there."""
        if self._lib.bpf_map_delete_elem(self.fd, key) != 0 and self._ffi.errno != errno.ENOENT:
            raise _failed(self._lib, self._ffi, "deleting from a map")

    def __iter__(self) -> Iterator[bytes]:
        """The keys there are now; one that comes or goes meanwhile may be in it or not."""
        found: list[bytes] = []
        key: Any = self._ffi.NULL
        following = self._ffi.new("char[]", self.key_size)
        # A key that goes while we stand on it makes the walk begin anew.
        for _ in range(2 * self.max_entries):
            if self._lib.bpf_map_get_next_key(self.fd, key, following) != 0:
                if self._ffi.errno != errno.ENOENT:
                    raise _failed(self._lib, self._ffi, "walking a map")
                break
            found.append(bytes(self._ffi.buffer(following)))
            key = found[-1]
        return iter(dict.fromkeys(found))


class BpfObject:
    """A compiled object of this package: opened, then loaded, its programs attached.

    A context manager; closing it detaches what is not pinned.
    """

    def __init__(self, name: str) -> None:
        """`name` as in bpf/NAME.bpf.c. BpfError if it cannot be opened."""
        self._ffi, self._lib = _library()
        self._links: dict[str, Any] = {}
        path = OBJECTS / f"{name}.bpf.o"
        if not path.exists():
            raise BpfError(errno.ENOENT, f"{path.name} was not built: run scripts/build-bpf")
        self._lib.hwerr_libbpf_said()  # what went well so far is no reason for what may fail now
        self._object = self._lib.bpf_object__open_file(os.fsencode(path), self._ffi.NULL)
        if self._object == self._ffi.NULL:
            raise _failed(self._lib, self._ffi, f"opening {path.name}")
        self.name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detaches what is not pinned, and lets go of the rest. A second time does nothing."""
        for link in self._links.values():
            self._lib.bpf_link__destroy(link)
        self._links.clear()
        if self._object is not None:
            self._lib.bpf_object__close(self._object)
            self._object = None

    def programs(self) -> dict[str, Any]:
        """The programs by name."""
        found: dict[str, Any] = {}
        program = self._ffi.NULL
        while True:
            program = self._lib.bpf_object__next_program(self._object, program)
            if program == self._ffi.NULL:
                return found
            found[self._ffi.string(self._lib.bpf_program__name(program)).decode()] = program

    def only(self, *names: str) -> None:
        """Leaves all other programs out of the load."""
        for name, program in self.programs().items():
            self._lib.bpf_program__set_autoload(program, name in names)

    def loaded(self) -> set[str]:
        """The programs that are in the kernel."""
        return {n for n, program in self.programs().items() if self._lib.bpf_program__fd(program) >= 0}

    def misses(self, name: str) -> int:
        """Calls of a program that the kernel left out, because it ran on that CPU already."""
        return max(0, int(self._lib.hwerr_program_misses(self._lib.bpf_program__fd(self.programs()[name]))))

    def _map(self, name: str) -> Any:
        found = self._lib.bpf_object__find_map_by_name(self._object, name.encode())
        if found == self._ffi.NULL:
            raise BpfError(errno.ENOENT, f"{self.name}.bpf.o has no map {name}")
        return found

    def reuse(self, name: str, other: Map) -> None:
        """Has the object use a map that there is already. Before load()."""
        if self._lib.bpf_map__reuse_fd(self._map(name), other.fd) != 0:
            raise _failed(self._lib, self._ffi, f"using the map {name} again")

    def constant(self, name: str, value: int) -> None:
        """Sets what the programs have as `const volatile __u32`, alone in `.rodata.NAME`. Before load()."""
        if self._lib.bpf_map__set_initial_value(self._map(f".rodata.{name}"), value.to_bytes(4, "little"), 4):
            raise _failed(self._lib, self._ffi, f"setting {name}")

    def load(self) -> None:
        """Into the kernel, through its verifier."""
        if self._lib.bpf_object__load(self._object) != 0:
            raise _failed(self._lib, self._ffi, f"loading {self.name}.bpf.o")

    def map_fd(self, name: str) -> int:
        """The object's own descriptor of a map, valid until close()."""
        return int(self._lib.bpf_map__fd(self._map(name)))

    def attach(self, name: str) -> None:
        """Attaches a program; it stays so until close(), or as long as its link is pinned."""
        link = self._lib.bpf_program__attach(self.programs()[name])
        if link == self._ffi.NULL:
            raise _failed(self._lib, self._ffi, f"attaching {name}")
        self._links[name] = link

    def pin_link(self, name: str, path: Path) -> None:
        """FileExistsError if something is pinned there."""
        self._pin(self._lib.bpf_link__fd(self._links[name]), path)

    def pin_map(self, name: str, path: Path) -> None:
        """FileExistsError if something is pinned there."""
        self._pin(self.map_fd(name), path)

    def _pin(self, fd: int, path: Path) -> None:
        if self._lib.bpf_obj_pin(fd, os.fsencode(path)) != 0:
            if self._ffi.errno == errno.EEXIST:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            raise _failed(self._lib, self._ffi, f"pinning {path}")


@contextlib.contextmanager
def locked(pin_dir: Path, wait: bool = True) -> Iterator[None]:
    """One at a time; makes the directory. BlockingIOError if it is taken and one is not to wait."""
    pin_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


# -- the seal --------------------------------------------------------------

# Programs, which are pinned under their names, and what the kernel must have for each.
_PROGRAMS = {
    "hwerr_seal_ioctl": "bpf_lsm_file_ioctl",
    "hwerr_seal_ioctl_compat": "bpf_lsm_file_ioctl_compat",
    "hwerr_seal_open": "bpf_lsm_file_open",
    "hwerr_seal_write": "bpf_lsm_file_permission",
    "hwerr_seal_lock": "bpf_lsm_file_lock",
    "hwerr_seal_connect": "bpf_lsm_socket_connect",
}
# Maps, pinned under their names, too: what they hold and the sizes of key and value (bpf/seal.h).
_MAP, _KEPT_OUT = "hwerr_seals", "hwerr_kept_out"
_SIZES = {_MAP: (_KEY_SIZE, _SEAL_SIZE), _KEPT_OUT: (16, 8)}
# Inodes of no file (device 0), where refusals are counted of what has none.
_DEVICES, _SOCKETS = 0, 1


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def start_of(tgid: int) -> int:
    """When the process started: CLOCK_BOOTTIME, ns, rounded down to 10 ms. ProcessLookupError if gone."""
    try:
        stat = Path(f"/proc/{tgid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, f"there is no process {tgid}") from None
    # proc(5): starttime is field 22; the name, field 2, may hold blanks.
    return int(stat.rpartition(")")[2].split()[19]) * _NSEC_PER_TICK


def inode_of(path: str | os.PathLike[str], pid: int | None = None) -> tuple[int, int]:
    """(device, inode) of a file as the kernel numbers them. OSError.

    stat(2) has another device for what is on btrfs, overlayfs and their like. With `pid`, the file is what
    that process finds under the path.
    """
    where = Path("/proc", str(pid) if pid is not None else "self")
    found = os.fspath(path)
    if pid is not None:
        found = f"{where}/{'root' if found.startswith('/') else 'cwd'}/{found.lstrip('/')}"
    fd = os.open(found, os.O_PATH | os.O_CLOEXEC)
    try:
        return _inode(Path(f"/proc/self/fdinfo/{fd}"), [where], found)
    finally:
        os.close(fd)


def inode_of_open(pid: int, fd: int) -> tuple[int, int]:
    """As `inode_of()`, of what a process has open. OSError."""
    # It may have been opened by somebody else, who sees other mounts.
    where = [Path("/proc", str(pid)), Path("/proc/self")]
    return _inode(where[0] / "fdinfo" / str(fd), where, f"file {fd} of process {pid}")


def _inode(fdinfo: Path, mounts: Iterable[Path], name: str) -> tuple[int, int]:
    info = fdinfo.read_text("ascii", "replace")
    inode = re.search(r"^ino:\s*(\d+)", info, re.MULTILINE)
    mount = re.search(r"^mnt_id:\s*(\d+)", info, re.MULTILINE)
    # Since 5.14 (3845f256a8b5).
    if inode is None or mount is None:
        raise OSError(errno.ENOSYS, "fdinfo does not name the inode", name)
    for who in mounts:
        for line in (who / "mountinfo").read_text("utf-8", "replace").splitlines():
            fields = line.split(None, 3)
            if fields[0] == mount[1]:
                major, minor = map(int, fields[2].split(":"))
                return major << 20 | minor, int(inode[1])
    raise OSError(errno.ENOENT, "its mount is not to be seen", name)


@dataclass(frozen=True, slots=True)
class SealState:
    """A sealed process: its start (CLOCK_BOOTTIME, ns) and how often KVM_RUN was refused to it."""

    start_ns: int
    refusals: int


class Seal:
    """The seal as it is in the kernel. A context manager; closing it unseals nobody."""

    def __init__(self, seals: Map, kept_out: Map, pins: dict[Path, tuple[int, int] | None]) -> None:
        """Use `load()` or `open_pinned()`."""
        self._map = seals
        self._kept_out = kept_out
        self._pins = pins

    @staticmethod
    def available(pin_dir: Path = PIN_DIR) -> str | None:
        """None if the seal can be had on this host, else the reason why not, in one line.

        Loads nothing. What only an attempt can tell is told by `load()`.
        """
        if reason := unavailable(pin_dir):
            return reason
        try:
            modules = Path("/sys/kernel/security/lsm").read_text("ascii").strip().split(",")
        except OSError:
            return None  # securityfs is not mounted: load() will tell
        if "bpf" not in modules:
            return (
                "BPF is not among the kernel's security modules: add it to lsm= on the kernel command line "
                f"(lsm={','.join([*(m for m in modules if m != 'capability'), 'bpf'])})"
            )
        return None

    @classmethod
    def load(cls, pin_dir: Path = PIN_DIR) -> Seal:
        """Has the seal in force and pinned, if it is not yet, and opens it.

        What is sealed stays sealed. BpfError with the reason if it cannot be had, or if
        it is there and does not refuse.
        """
        if reason := cls.available(pin_dir):
            raise BpfError(errno.EOPNOTSUPP, reason)
        with locked(pin_dir):
            # In this order: a link that is pinned always has its map pinned.
            missing = [
                name
                for name, hook in _PROGRAMS.items()
                if not (pin_dir / name).exists() and kernel_has_type(hook)
            ]
            if missing:
                cls._load(pin_dir, missing)
        return cls.open_pinned(pin_dir)

    @classmethod
    def _load(cls, pin_dir: Path, names: list[str]) -> None:
        with BpfObject("seal") as programs:
            programs.only(*names)
            for name in _SIZES:
                with contextlib.suppress(FileNotFoundError), cls._open_map(pin_dir, name) as old:
                    programs.reuse(name, old)
            programs.load()
            for name in _SIZES:
                with contextlib.suppress(FileExistsError):
                    programs.pin_map(name, pin_dir / name)
            for name in names:
                programs.attach(name)
                programs.pin_link(name, pin_dir / name)

    @staticmethod
    def _open_map(pin_dir: Path, name: str) -> Map:
        found = Map.pinned(pin_dir / name)
        if (found.key_size, found.value_size) != _SIZES[name]:
            found.close()
            raise BpfError(
                errno.EINVAL,
                f"{pin_dir / name} is of another version: when nothing is sealed, remove {pin_dir}",
            )
        return found

    @classmethod
    def open_pinned(cls, pin_dir: Path = PIN_DIR) -> Seal:
        """The seal that is in force. FileNotFoundError if there is none, BpfError if it does not refuse."""
        _library()
        if not (pin_dir / next(iter(_PROGRAMS))).exists():
            raise FileNotFoundError(errno.ENOENT, "the seal is not loaded", str(pin_dir))
        pins = {pin_dir / name: _identity(pin_dir / name) for name in (*_PROGRAMS, *_SIZES)}
        seals = cls._open_map(pin_dir, _MAP)
        try:
            seal = cls(seals, cls._open_map(pin_dir, _KEPT_OUT), pins)
        except BaseException:
            seals.close()
            raise
        try:
            seal.prove()
        except BaseException:
            seal.close()
            raise
        return seal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._map.close()
        self._kept_out.close()

    def in_force(self) -> bool:
        """Whether all that was pinned when this was opened still is: with its pin a program goes, too."""
        return all(_identity(path) == before for path, before in self._pins.items())

    def renewed(self) -> Seal:
        """This one, if it is in force; else one that is, with all that was sealed here. BpfError as `load()`.

        Somebody may have unmounted the file system of its pins, or removed them.
        """
        if self.in_force():
            return self
        fresh = Seal.load(next(iter(self._pins)).parent)
        try:
            # What is refused first, then to whom.
            for old, new in ((self._kept_out, fresh._kept_out), (self._map, fresh._map)):
                for key in old:
                    with contextlib.suppress(FileExistsError, KeyError):
                        new.set(key, old[key], new=True)
        except BaseException:
            fresh.close()
            raise
        self.close()
        return fresh

    def prove(self) -> None:
        """Seals this process for a moment and tries: BpfError if it was not refused.

        The hooks come before the file's own ioctl, so any file will do, and before a socket's peer is sought.
        """
        me = os.getpid()
        fd = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        path = f"/proc/self/fd/{fd}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unconnected:
                self.seal(me, start_of(me), [inode_of("/dev/null")])
                self._refused("KVM_RUN", lambda: fcntl.ioctl(fd, _KVM_RUN))
                self._refused("opening a file", lambda: os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
                self._refused("writing", lambda: os.write(fd, b"x"))
                self._refused("locking", lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
                self._refused("connecting", lambda: unconnected.connect("\0hwerr-nobody"))
        finally:
            self.unseal(me)
            os.close(fd)

    @staticmethod
    def _refused(what: str, attempt: Callable[[], object]) -> None:
        why = ""
        try:
            attempt()
        except PermissionError:
            return
        except OSError as error:
            why = f": {error.strerror}"
        raise BpfError(errno.EIO, f"the seal is loaded but does not refuse ({what}{why})")

    def seal(self, tgid: int, start_ns: int, files: Iterable[tuple[int, int]] = ()) -> None:
        """KVM_RUN is refused from now on to that process, if it is the one that started then.

        And opening any device but the harmless, or one of `files` (`inode_of()`), writing to it and locking
        it; and connecting a socket. What is open stays so.

        `start_ns` is of CLOCK_BOOTTIME, exact (`Guest.start_ns`) or to 10 ms (`start_of()`). A vCPU
        that is in the guest now stays there until it next leaves for user space: stop it first.
        Doing it again changes nothing.
        """
        key = self._key(tgid)
        state = self._state(key)
        known = state is not None and state.start_ns // _NSEC_PER_TICK == start_ns // _NSEC_PER_TICK
        if not known:
            # Of another process that had the number.
            self._let_in({tgid})
        for device, inode in [(0, _DEVICES), (0, _SOCKETS), *files]:
            with contextlib.suppress(FileExistsError):
                self._put(self._kept_out, self._entry(tgid, device, inode), bytes(8), new=True)
        if not known:
            self._put(self._map, key, start_ns.to_bytes(8, "little") + bytes(8))

    def _put(self, into: Map, key: bytes, value: bytes, *, new: bool = False) -> None:
        try:
            into.set(key, value, new=new)
        except BpfError as error:
            if error.errno != errno.E2BIG or not self.forget_dead():
                raise
            into.set(key, value, new=new)

    def unseal(self, tgid: int) -> None:
        """Lets the process run its vCPUs again; nothing if it is not sealed."""
        self._map.discard(self._key(tgid))
        self._let_in({tgid})

    def _let_in(self, tgids: set[int]) -> None:
        """One walk for all, and none where there is nothing."""
        if not any(self._has(self._entry(tgid, 0, _DEVICES)) for tgid in tgids):
            return
        keys = {self._key(tgid) for tgid in tgids}
        # What says that there is something goes last.
        for entry in sorted((e for e in self._kept_out if e[:_KEY_SIZE] in keys), reverse=True):
            self._kept_out.discard(entry)

    def _has(self, entry: bytes) -> bool:
        try:
            return bool(self._kept_out[entry])
        except KeyError:
            return False

    def refused_opens(self, tgid: int) -> int:
        """How often a sealed process was refused to open, write to or lock something; 0 if not sealed."""
        key = self._key(tgid)
        mine = [e for e in self._kept_out if e.startswith(key)]
        return sum(map(self._count, set(mine) - {self._entry(tgid, 0, _SOCKETS)}))

    def refused_connects(self, tgid: int) -> int:
        """How often a sealed process was refused to connect a socket; 0 if it is not sealed."""
        return self._count(self._entry(tgid, 0, _SOCKETS))

    def _count(self, entry: bytes) -> int:
        try:
            return int.from_bytes(self._kept_out[entry], "little")
        except KeyError:
            return 0

    @classmethod
    def _entry(cls, tgid: int, device: int, inode: int) -> bytes:
        return cls._key(tgid) + device.to_bytes(4, "little") + inode.to_bytes(8, "little")

    def state(self, tgid: int) -> SealState | None:
        """Of one process, which may have ended; None if it is not sealed."""
        return self._state(self._key(tgid))

    def sealed(self) -> dict[int, SealState]:
        """What is sealed, by process number; processes that have ended may be among them."""
        states = {int.from_bytes(key, "little"): self._state(key) for key in self._map}
        return {tgid: state for tgid, state in states.items() if state is not None}

    def forget_dead(self) -> int:
        """Removes the entries of processes that have ended; returns their number."""
        dead = set()
        for tgid, state in self.sealed().items():
            try:
                if start_of(tgid) // _NSEC_PER_TICK == state.start_ns // _NSEC_PER_TICK:
                    continue
            except ProcessLookupError:
                pass
            dead.add(tgid)
        for tgid in dead:
            self._map.discard(self._key(tgid))
        self._let_in(dead)
        return len(dead)

    @staticmethod
    def _key(tgid: int) -> bytes:
        if not 0 < tgid < 1 << 31:
            raise ValueError(f"{tgid} is no process number")
        return tgid.to_bytes(_KEY_SIZE, "little")

    def _state(self, key: bytes) -> SealState | None:
        try:
            value = self._map[key]
        except KeyError:
            return None
        return SealState(int.from_bytes(value[:8], "little"), int.from_bytes(value[8:], "little"))


# -- a ring buffer ---------------------------------------------------------


class Ring:
    """Reads a BPF ring buffer. One reader at a time, in the whole system: see `locked()`."""

    _bound = False

    def __init__(self, buffer: Map, handle: Callable[[bytes], None]) -> None:
        """`handle` gets each sample; the buffer lets go of it only when `handle` has returned."""
        self._ffi, self._lib = _library()
        if not Ring._bound:
            self._ffi.def_extern(name="hwerr_ring_sample", onerror=None)(self._sample)
            Ring._bound = True
        self._handle = handle
        self._error: BaseException | None = None
        self._self = self._ffi.new_handle(self)
        self._ring = self._lib.hwerr_ring_new(buffer.fd, self._self)
        if self._ring == self._ffi.NULL:
            raise _failed(self._lib, self._ffi, "mapping the ring buffer")

    @staticmethod
    def _sample(context: Any, data: Any, size: int) -> int:
        ffi, _ = _library()
        ring: Ring = ffi.from_handle(context)
        try:
            ring._handle(bytes(ffi.buffer(data, size)))
        except BaseException as error:
            ring._error = error
            return -errno.ECANCELED
        return 0

    def fileno(self) -> int:
        """For poll: readable when there is something."""
        return int(self._lib.ring_buffer__epoll_fd(self._ring))

    def consume(self) -> int:
        """Hands over what is there; returns how much that was. What `handle` raises is raised."""
        done = self._lib.ring_buffer__consume(self._ring)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if done < 0:
            raise BpfError(-done, f"reading the ring buffer: {os.strerror(-done)}")
        return int(done)

    def close(self) -> None:
        if self._ring is not None:
            self._lib.ring_buffer__free(self._ring)
            self._ring = None
