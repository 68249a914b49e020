# SPDX-License-Identifier: MIT
"""`make install` and `make uninstall` on a Debian 12, in its own root directory and in a VM.

The Debian is made by mmdebstrap once for a kernel, and kept in the cache. The installation
runs without network; its module is loaded and its commands run in a test VM of that kernel.
Needs root (for chroot and mounts).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("HWERR_CACHE") or Path.home() / ".cache" / "hwerr")
KERNEL = os.environ.get("HWERR_KERNEL", "6.1")
ROOT = TOP / "build/packaging/root"
CHECKOUT = "/root/hwerr"
# README.md, "On a host", and what a Debian host has anyway.
PACKAGES = "dkms gcc make python3-venv python3-dev python3-setuptools python3-wheel python3-cffi python3-rich"
HOST = "kmod man-db"
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def kernel_release() -> str:
    argv = [str(TOP / "scripts/kernel"), "release", KERNEL]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def sources() -> list[str]:
    """The Debian archives that apt on this machine is configured with."""
    argv = [
        "apt-get",
        "indextargets",
        "--format",
        "$(LABEL)|deb $(SITE) $(RELEASE) main",
        "Created-By: Packages",
    ]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(
        {line.split("|")[1] for line in lines if line.split("|")[0] in ("Debian", "Debian-Security")}
    )


def base(release: str) -> Path:
    """A Debian with the packages that the installation asks for, as an archive."""
    include = ",".join(f"{PACKAGES} {HOST} linux-headers-{release}".split())
    archive = CACHE / "packaging" / f"{sha256(include.encode()).hexdigest()[:16]}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        part = archive.with_suffix(".part.tar")
        argv = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={include}", "bookworm", str(part)]
        subprocess.run([*argv, "-"], input="\n".join(sources()), text=True, check=True)
        part.rename(archive)
    return archive


def in_root(command: str, *, status: int = 0) -> str:
    """Run it there, without network; returns what it printed."""
    enter = (
        f"mount -t proc proc {ROOT}/proc && mount --rbind /dev {ROOT}/dev &&"
        f" exec chroot {ROOT} bash -c {shlex.quote(command)}"
    )
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "bash", "-c", enter],
        capture_output=True, text=True, timeout=900, check=False,
        env={"PATH": SEARCH, "HOME": "/root", "LANG": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


# What programs that are not ours leave behind: logs, caches, DKMS' key, depmod's indexes.
_NOT_OURS = re.compile(
    r"/(proc|sys|dev|run|tmp|var/(log|tmp|cache))(/|$)|/__pycache__(/|$)|/modules\.[a-z.]+$|/var/lib/dkms/mok\."
)


def everything() -> dict[str, tuple[int, int, str]]:
    """Each path with its mode, size and, of a link, target."""
    found = {}
    for directory, dirs, files in os.walk(ROOT):
        for name in (*dirs, *files):
            path = Path(directory, name)
            inside = "/" + str(path.relative_to(ROOT))
            if _NOT_OURS.search(inside):
                continue
            info = path.lstat()
            size = 0 if stat.S_ISDIR(info.st_mode) else info.st_size
            found[inside] = (info.st_mode, size, os.readlink(path) if path.is_symlink() else "")
    return found


def changes(before: dict[str, tuple[int, int, str]]) -> set[str]:
    now = everything()
    return {p for p in before.keys() | now.keys() if before.get(p) != now.get(p)}


@pytest.fixture(scope="module")
def release() -> Iterator[str]:
    """The kernel that the Debian in ROOT has headers for; the checkout is in it."""
    release = kernel_release()
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    subprocess.run(["tar", "-C", ROOT, "-xf", base(release), "--exclude=./dev/*"], check=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, check=True, capture_output=True).stdout
    copy = ["cpio", "--null", "--pass-through", "--make-directories", "--quiet", f"{ROOT}{CHECKOUT}"]
    Path(f"{ROOT}{CHECKOUT}").mkdir(parents=True)
    subprocess.run(copy, cwd=TOP, input=files, check=True)
    yield release
    shutil.rmtree(ROOT, ignore_errors=True)


def test_a_missing_package_is_named(release: str) -> None:
    before = everything()
    said = in_root(f"cd {CHECKOUT} && packaging/install --kernel 1.2.3-none", status=69)
    assert said == "install: first: apt-get install linux-headers-1.2.3-none\n"
    assert "not installed here" in in_root(f"cd {CHECKOUT} && packaging/install --remove", status=1)
    assert not changes(before)


def test_below_another_root_it_is_made_for_there(release: str) -> None:
    """As a package is made: what was built below --root runs where it will be unpacked."""
    before = everything()
    in_root(f"cd {CHECKOUT} && packaging/install --kernel {release} --root /staging")
    assert in_root("grep -rlF /staging /staging/opt/hwerr/bin /staging/opt/hwerr/pyvenv.cfg", status=1) == ""
    in_root("mv /staging/opt/hwerr /opt/hwerr && mv /staging/usr/local/bin/hwerr-watch /usr/local/bin/")
    assert "usage: hwerr-watch" in in_root("hwerr-watch --help")
    in_root("rm -r /staging /opt/hwerr /usr/local/bin/hwerr-watch")
    assert not changes(before)


def test_install_use_and_uninstall(release: str) -> None:
    before = everything()
    in_root(f"cd {CHECKOUT} && packaging/install --kernel {release}")
    installed = changes(before)
    # Again, as for a newer version: the same comes out.
    in_root(f"cd {CHECKOUT} && packaging/install --kernel {release}")
    assert changes(before) == installed
    # A version that does not build leaves this one as it is.
    for broken in ("kmod/main.c", "hwerr_notify/_scan.c"):
        in_root(f"cd {CHECKOUT} && cp {broken} /tmp/kept && echo '#error broken' >>{broken}")
        said = in_root(f"cd {CHECKOUT} && packaging/install --kernel {release}", status=1)
        assert "install: failed: building" in said
        in_root(f"cd {CHECKOUT} && cp /tmp/kept {broken} && rm /tmp/kept")
        assert changes(before) == installed
    # The checkout stays as it was, and nothing is where nobody would look.
    places = (
        "/usr/src/hwerr-",
        "/opt/hwerr",
        "/usr/local/",
        "/etc/",
        "/usr/lib/ocf",
        "/var/lib/dkms/hwerr",
        f"/usr/lib/modules/{release}/updates",
    )
    assert not [p for p in installed if not p.startswith(places)]

    assert re.search(
        rf"^hwerr/[0-9.]+, {re.escape(release)}, x86_64: installed", in_root("dkms status"), re.M
    )
    assert "usage: hwerr-watch" in in_root("hwerr-watch --help")
    assert in_root("hwerr-watch", status=4).startswith("hwerr-watch: ")
    for section, page in ((1, "hwerr-watch"), (1, "hwerr-guard"), (4, "hwerr")):
        # Debian's /usr/local/man is a link to share/man.
        found = in_root(f"man -w {page}").strip().replace("/usr/local/man/", "/usr/local/share/man/")
        assert found == f"/usr/local/share/man/man{section}/{page}.{section}"
    in_root("echo '#include <hwerr.h>' | gcc -fsyntax-only -Wall -Werror -x c -")
    in_root(f"gcc -Wall -Werror -I/usr/local/include -o /tmp/poll {CHECKOUT}/examples/hwerr-poll.c")

    in_vm(f"""
        set -ex
        R={ROOT}
        for d in proc sys dev run tmp; do mount --rbind /$d $R/$d; done
        here() {{ chroot $R env PATH={SEARCH} "$@"; }}
        here modprobe hwerr
        hwerr-inject mce --status 0x9c00000000080813 --bank 4 --addr 0x40001000 --misc 0x8c
        here hwerr-watch --since oldest --count 1 --timeout 60 --json > {ROOT}/tmp-event
        here /opt/hwerr/bin/python -c "
import hwerr_notify
with hwerr_notify.open(since='oldest') as errors:
    assert errors.read(timeout=0)[0].source == hwerr_notify.Source.MCE
"
        # Not while somebody listens; and then altogether.
        exec 8</dev/hwerr
        status=0; said=$(here make -C {CHECKOUT} uninstall 2>&1) || status=$?
        [ $status -ne 0 ]; [[ $said == *"a program has /dev/hwerr open"* ]]
        here hwerr-watch --stats
        exec 8<&-
        here make -C {CHECKOUT} uninstall
        [ ! -e /sys/module/hwerr ] && [ ! -e /dev/hwerr ]
    """)
    event = json.loads((ROOT / "tmp-event").read_text("utf-8"))
    (ROOT / "tmp-event").unlink()
    assert (event["source"], event["severity"], event["phys_addr"]) == ("mce", "corrected", "0x40001000")
    assert not changes(before)
    assert in_root("dkms status") == ""


def in_vm(script: str) -> None:
    """Run it in a test VM of that kernel, in which no hwerr is loaded."""
    argv = [str(TOP / "tests/vm/run"), "--kernel", KERNEL, "--no-module", "--", "bash", "-c", script]
    done = subprocess.run(argv, cwd=TOP, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
