# SPDX-License-Identifier: MIT
"""A cluster node: runs in its test VM, makes a node of it, does what the bed tells it.

A line of JSON comes over the virtio port org.hwerr.bed, {"do": NAME, ...arguments}, and one goes
back: {"ok": RESULT} or {"error": TEXT}. One after the other.

Corosync and Pacemaker are those of scripts/ha-root, laid over this VM's /usr; the VM's /etc and
/var/lib are writable and in memory. There is no fencing, and two nodes cannot outvote one another:
`stonith-enabled=false`, `no-quorum-policy=ignore`, `two_node: 1`. So what is shown is that a FROZEN guest
needs no fencing, not what becomes of a lost node.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guarded
from guarded import Daemon, vcpu_time
from testbed import inject
from testbed.errors import TestbedError
from testbed.kernel import modprobe
from testbed.qmp import Qmp
from testbed.records import MceRecord

HOME = Path("/run/hwerr-ha")
HERE = Path(__file__).resolve().parent
TREE = HERE.parents[1]
PORT = Path("/dev/virtio-ports/org.hwerr.bed")
NAME = "counter"
NODES = ("alpha", "beta")

# An uncorrected DRAM error as AMD's northbridge (bank 4) logs it: VAL UC EN MISCV ADDRV.
UNCORRECTED = 0xBC00_0000_0008_0813
HIT_GPA = 0x200000

_OF_A_THREAD = ("comm", "stat", "syscall", "stack")

COROSYNC = """\
totem {
  version: 2
  cluster_name: hwerr
  transport: udpu
  token: %(token)d
  secauth: off
}
nodelist {
%(nodes)s}
quorum {
  provider: corosync_votequorum
  two_node: 1
  wait_for_all: 0
}
logging {
  to_syslog: no
  to_logfile: yes
  logfile: /run/hwerr-ha/corosync.log
  timestamp: hires
}
"""

# The resource may not run where the guard's attribute is set; nothing moves it back after that.
CIB = """\
<configuration>
<crm_config><cluster_property_set id="options">
<nvpair id="o1" name="stonith-enabled" value="false"/>
<nvpair id="o2" name="no-quorum-policy" value="ignore"/>
</cluster_property_set></crm_config>
<nodes/>
<resources>%(primitive)s</resources>
<constraints>%(constraints)s</constraints>
<rsc_defaults><meta_attributes id="defaults">
<nvpair id="d1" name="resource-stickiness" value="1000"/>
</meta_attributes></rsc_defaults>
<alerts><alert id="timeline" path="/run/hwerr-ha/alert"/></alerts>
</configuration>
"""

CONSTRAINTS = """\
<rsc_location id="first" rsc="counter" node="alpha" score="1"/>
<rsc_location id="frozen" rsc="counter"><rule id="frozen-rule" score="-INFINITY">
<expression id="frozen-set" attribute="hwerr-counter" operation="defined"/></rule></rsc_location>
"""

GUEST = """\
<primitive id="counter" class="ocf" provider="hwerr" type="guest">
<instance_attributes id="a"><nvpair id="a1" name="name" value="counter"/>
<nvpair id="a2" name="script" value="/run/hwerr-ha/counter"/>
<nvpair id="a3" name="run_dir" value="/run/hwerr-ha/guard/run"/></instance_attributes>
<operations><op id="op1" name="monitor" interval="10s" timeout="300s"/>
<op id="op2" name="start" interval="0" timeout="300s"/>
<op id="op3" name="stop" interval="0" timeout="300s"/></operations>
</primitive>
"""

# What a cluster has without hwerr: the process is looked for every 10 s, and is started on the other
# node when it is gone. `reboot=shutdown` in tests/ha/counter has a guest that the error resets end;
# without, it would go on where the error was, and the cluster would never know.
STOCK = """\
<primitive id="counter" class="ocf" provider="heartbeat" type="anything">
<instance_attributes id="a"><nvpair id="a1" name="binfile" value="/run/hwerr-ha/counter"/>
<nvpair id="a2" name="cmdline_options" value="run"/>
<nvpair id="a3" name="pidfile" value="/run/hwerr-ha/anything.pid"/>
<nvpair id="a4" name="logfile" value="/run/hwerr-ha/anything.log"/></instance_attributes>
<meta_attributes id="m"><nvpair id="m1" name="migration-threshold" value="1"/></meta_attributes>
<operations><op id="op1" name="monitor" interval="10s" timeout="300s"/>
<op id="op2" name="start" interval="0" timeout="300s"/>
<op id="op3" name="stop" interval="0" timeout="300s"/></operations>
</primitive>
"""

# Two emulated machines share what one has in tests/vm.
guarded.LIMIT = 400.0


class NodeError(Exception):
    """What a node could not do, and why."""


def run(*argv: str, stdin: str | None = None, limit: float = 120, check: bool = True) -> str:
    """A program's output. NodeError if it fails."""
    try:
        done = subprocess.run(
            argv, input=stdin or "", capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise NodeError(f"{shlex.join(argv)} did not end within {limit:g} s") from None
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise NodeError(f"{shlex.join(argv)} ended with {done.returncode}: {said}")
    return done.stdout


class Node:
    """Every public method is something the bed may ask for."""

    def __init__(self) -> None:
        self.name = socket.gethostname()
        self.number = NODES.index(self.name)
        self.guard: Daemon | None = None
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.ended: dict[int, int] = {}

    # -- what a VM becomes a node with --------------------------------------

    def prepare(self, root: str, rom: str) -> None:
        """The file systems, the network and the disk."""
        # All of them now: /lib/modules is out of sight below the new /usr.
        for module in ("overlay", "virtio_net", "virtio_blk", "mce-inject", "hwpoison-inject"):
            modprobe(module)
        HOME.mkdir(mode=0o1777, exist_ok=True)
        HOME.chmod(0o1777)
        for directory in ("usr", "etc", "var/lib"):
            layer = Path("/run/layers") / directory
            (layer / "upper").mkdir(parents=True)
            (layer / "work").mkdir()
            run("mount", "-t", "overlay", "-o",
                f"lowerdir={root}/{directory}:/{directory},upperdir={layer}/upper,workdir={layer}/work",
                "overlay", f"/{directory}")  # fmt: skip
        # As the packages' postinst scripts do.
        for path, line in (("passwd", "hacluster:x:189:189::/var/lib/pacemaker:/usr/sbin/nologin"),
                           ("group", "haclient:x:189:")):  # fmt: skip
            with (Path("/etc") / path).open("a", encoding="ascii") as file:
                file.write(line + "\n")
        for directory in ("/var/lib/pacemaker", "/var/log/pacemaker", "/var/lib/corosync"):
            for sub in ("", "blackbox", "cib", "cores", "pengine"):
                Path(directory, sub).mkdir(parents=True, exist_ok=True)
            if "pacemaker" in directory:
                run("chown", "-R", "hacluster:haclient", directory)
        agents = Path("/usr/lib/ocf/resource.d/hwerr")
        agents.mkdir(exist_ok=True)
        shutil.copy(TREE / "packaging/ocf/guest", agents / "guest")
        for name in ("counter", "alert"):
            shutil.copy(HERE / name, HOME / name)
        shutil.copy(rom, HOME / "rom")
        (HOME / "alerts").touch()
        (HOME / "alerts").chmod(0o666)
        (HOME / "starts").touch()
        serials = Path("/sys/block").glob("vd*/serial")
        (disk,) = [p.parent.name for p in serials if "shared" in p.read_text("ascii")]
        (HOME / "disk").symlink_to(f"/dev/{disk}")
        (interface,) = [p.name for p in Path("/sys/class/net").iterdir() if p.name != "lo"]
        run("ip", "address", "add", f"10.77.0.{self.number + 1}/24", "dev", interface)
        run("ip", "link", "set", interface, "up")

    def cluster(self, token: int = 60000) -> None:
        """Corosync and Pacemaker. Returns when this node's Pacemaker answers."""
        nodes = "".join(
            f"  node {{\n    name: {name}\n    nodeid: {n + 1}\n    ring0_addr: 10.77.0.{n + 1}\n  }}\n"
            for n, name in enumerate(NODES)
        )
        Path("/etc/corosync/corosync.conf").write_text(COROSYNC % {"token": token, "nodes": nodes}, "ascii")
        self._daemon("corosync", "-f")
        self._until(lambda: "hwerr" in run("corosync-cmapctl", "-g", "totem.cluster_name", check=False))
        self._daemon("pacemakerd")
        self._until(lambda: run("crm_node", "-n", check=False).strip() == self.name)

    def _daemon(self, *argv: str) -> None:
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "LANG": "C", "HOME": "/run/home"}
        environment["PCMK_logfile"] = "/run/hwerr-ha/pacemaker.log"
        with (HOME / f"{argv[0]}.out").open("ab") as out:
            self.daemons.append(
                subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
            )

    def _until(self, holds: Callable[[], object], limit: float = 280) -> None:
        """For what no event tells: while the cluster comes up."""
        deadline = time.monotonic() + limit
        while not holds():
            for daemon in self.daemons:
                if daemon.poll() is not None:
                    raise NodeError(f"{daemon.args!r} ended with {daemon.returncode}: {self.log()}")
            if time.monotonic() > deadline:
                raise NodeError(f"the cluster did not come up within {limit:g} s: {self.log()}")
            time.sleep(0.2)

    def members(self) -> list[str]:
        """Nodes that Pacemaker has in its partition."""
        return run("crm_node", "-p", check=False).split()

    def await_members(self) -> None:
        """Until Pacemaker sees all nodes and has made one of them its controller."""
        self._until(lambda: set(self.members()) == set(NODES))
        # `crmadmin --dc_lookup` runs in circles when it is asked before there is one.
        self._until(lambda: "dc-uuid=" in run("cibadmin", "--query", "--local", check=False))

    def guarded(self, policy: str = "") -> None:
        """hwerr-guard, which tells Pacemaker."""
        home = HOME / "guard"
        home.mkdir(exist_ok=True)
        self.guard = Daemon(home, f'[pacemaker]\nresource = "{{name}}"\n{policy}').start()

    def unguarded(self) -> None:
        """No hwerr-guard any more."""
        self._guard().stop()
        self.guard = None

    def configure(self, what: str = "guest") -> None:
        """The resource, for the whole cluster: ocf:hwerr:guest, "stock" (without hwerr), or "nothing"."""
        primitive = {"guest": GUEST, "stock": STOCK, "nothing": ""}[what]
        cib = CIB % {"primitive": primitive, "constraints": CONSTRAINTS if primitive else ""}
        run("cibadmin", "--replace", "--scope", "configuration", "--xml-pipe", stdin=cib)

    # -- what is done with it -------------------------------------------------

    def time(self) -> int:
        """This node's clock, ns since the epoch."""
        return time.time_ns()

    def shell(self, command: str, limit: float = 120) -> str:
        return run("bash", "-c", command, limit=limit)

    def forgive(self) -> None:
        """Forget what failed here, so that the resource may come back."""
        run("crm_resource", "--cleanup", "--resource", NAME, "--node", self.name, limit=290)

    def settle(self) -> None:
        """Until Pacemaker has nothing to do."""
        run("crm_resource", "--wait", "--timeout", "280", limit=290)

    def where(self) -> str:
        """The node the resource is active on; "" if none."""
        words = run("crm_resource", "--resource", NAME, "--locate", "-Q", check=False).split()
        return words[0] if words else ""

    def pid(self) -> int:
        """The guest's QEMU; 0 if there is none."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((HOME / "counter.pid").read_text("ascii"))
            if "qemu" in os.readlink(f"/proc/{pid}/exe"):
                return pid
        return 0

    def began(self, pid: int) -> int:
        """When a process was made, ns since the epoch; to 10 ms."""
        ticks = int(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        booted = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return booted + ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")

    def inject(self, gpa: int = HIT_GPA, poison: bool = False) -> dict[str, int]:
        """An uncorrected memory error under the guest: a machine check into the decode chain.

        With `poison`, memory_failure() of the page after it, as the kernel does for an error that it
        takes for real; what reads the page then gets SIGBUS.
        """
        pid = self.pid()
        if not pid:
            raise NodeError("no guest runs here")
        qmp = Qmp.connect(HOME / "any.qmp")
        said = qmp.hmp(f"gpa2hpa {gpa:#x}")
        qmp.close()
        hpa = int(said.strip().rpartition("0x")[2], 16)
        self.ended.pop(pid, None)
        threading.Thread(target=self._watch, args=(pid, os.pidfd_open(pid)), daemon=True).start()
        record = MceRecord(status=UNCORRECTED, addr=hpa, misc=0x8C, bank=4)
        before = time.time_ns()
        inject.mce(record)
        if poison:
            inject.hwpoison(hpa >> 12)
        return {"time": before, "hpa": hpa, "pid": pid}

    def _watch(self, pid: int, pidfd: int) -> None:
        select.select([pidfd], [], [])
        self.ended[pid] = time.time_ns()
        os.close(pidfd)

    def when_ended(self, pid: int) -> int:
        """When the guest that was hit ended, ns since the epoch; 0 if it has not."""
        return self.ended.get(pid, 0)

    def mono_to_real(self) -> int:
        """What to add to this node's CLOCK_MONOTONIC, ns."""
        tries = []
        for _ in range(20):
            before = time.monotonic_ns()
            now = time.time_ns()
            after = time.monotonic_ns()
            tries.append((after - before, now - (before + after) // 2))
        return min(tries)[1]

    def starts(self) -> list[str]:
        """What the init script wrote: "NS starting|started UUID [PID]"."""
        return (HOME / "starts").read_text("ascii").splitlines()

    def alerts(self) -> list[str]:
        """What Pacemaker's alert agent wrote."""
        return (HOME / "alerts").read_text("utf-8").splitlines()

    def incidents(self) -> list[dict[str, Any]]:
        """From disk, oldest first."""
        return self._guard().incidents() if self.guard else []

    def await_told(self, count: int) -> dict[str, Any]:
        """Until incident number `count` (1 is the first) is told and dumped; the incident."""
        guard = self._guard()
        with guard.follow() as events:
            while True:
                found = guard.incidents()
                if len(found) >= count:
                    incident = dict(found[count - 1])
                    whole = {"tell", "keep"} <= set(incident["steps"])
                    if whole or incident["state"] not in ("freezing", "frozen"):
                        return incident
                events.next()

    def still(self, pid: int) -> list[tuple[int, int]]:
        """CPU times of a guest's vCPU threads."""
        return vcpu_time(_Process(pid))

    def stuck(self) -> str:
        """What the guest's threads wait for, and what QEMU says of it: for people."""
        pid = self.pid()
        if not pid:
            return "no guest runs here"
        lines = []
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            said = {name: (task / name).read_text("utf-8", "replace").strip() for name in _OF_A_THREAD}
            lines.append(f"{said['comm']}: {said['stat'].rpartition(')')[2].split()[0]}, {said['syscall']}")
            lines.append(said["stack"])
        try:
            qmp = Qmp.connect(HOME / "any.qmp")
            lines += [qmp.hmp(command) for command in ("info status", "info registers", "info block")]
            qmp.close()
        except TestbedError as error:
            lines.append(str(error))
        return "\n".join(lines)

    def alive(self, pid: int) -> bool:
        """Whether the process is there."""
        return Path(f"/proc/{pid}").exists()

    def clear(self, incident: str) -> None:
        """What `hwerr-guard clear` asks the daemon for: its QEMU ends."""
        _, status, error = self._guard().ask("clear", name=incident)
        if status:
            raise NodeError(f"clear {incident}: {error}")

    def log(self, lines: int = 30) -> str:
        """The ends of the logs."""
        texts = []
        for path in sorted([*HOME.glob("*.log"), *HOME.glob("*.out"), HOME / "guard/log"]):
            if path.exists():
                tail = path.read_text("utf-8", "replace").splitlines()[-lines:]
                texts.append("\n".join([f"== {path}", *tail]))
        return "\n".join(texts)

    def save_logs(self) -> None:
        """To the run's directory on the host."""
        where = Path(os.environ["HWERR_RUN_DIR"])
        more = [HOME / "guard/log", HOME / "alerts", HOME / "starts"]
        for path in [*HOME.glob("*.log"), *HOME.glob("*.out"), *more]:
            if path.exists():
                shutil.copy(path, where / f"{self.name}-{path.name}")

    def end(self) -> None:
        """Stop everything."""
        self.save_logs()
        if self.guard is not None:
            self.guard.stop()
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()

    def _guard(self) -> Daemon:
        if self.guard is None:
            raise NodeError("hwerr-guard does not run on this node")
        return self.guard


class _Process:
    def __init__(self, pid: int) -> None:
        self.pid = pid


def main() -> int:
    node = Node()
    with PORT.open("r+b", buffering=0) as port:
        buffer = b""
        while True:
            while b"\n" not in buffer:
                data = port.read(1 << 16)
                if not data:
                    return 1
                buffer += data
            line, _, buffer = buffer.partition(b"\n")
            request = json.loads(line)
            verb = request.pop("do")
            try:
                if verb.startswith("_"):
                    raise NodeError(f"{verb} is not for the bed")
                reply = {"ok": getattr(node, verb)(**request)}
            except Exception as error:
                reply = {"error": f"{verb} on {node.name}: {type(error).__name__}: {error}"}
            answer = json.dumps(reply).encode() + b"\n"
            while answer:
                answer = answer[port.write(answer) :]
            if verb == "end":
                return 0


if __name__ == "__main__":
    sys.exit(main())
