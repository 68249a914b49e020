# SPDX-License-Identifier: MIT
"""hwerr-trace: real tracepoints, next to the records of the same errors. The compiler is slow in a VM."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from probed import Service, fails
from testbed import inject
from testbed.kernel import load_sim, modprobe
from testbed.records import MCI_ADDRV, MCI_EN, MCI_MISCV, MCI_UC, MCI_VAL, AerRecord, MceRecord
from testbed.victim import Victim

from hwerr_notify import probe

COMPILE = 900.0
LIMIT = 120.0
# A northbridge's bank of an AMD CPU before Zen, extended error code 8: DRAM.
DRAM = MCI_VAL | MCI_EN | MCI_MISCV | MCI_ADDRV | 8 << 16


class Tracer:
    """hwerr-trace, attached."""

    def __init__(self, *argv: str) -> None:
        self.process = subprocess.Popen(
            ["with-headers", "hwerr-trace", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert self.process.stdout
        assert self.process.stderr
        self._out, self._err = self.process.stdout, self.process.stderr
        self._data = b""
        self.said = b""
        deadline = time.monotonic() + COMPILE
        while b"attached, after" not in self.said:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._err], [], [], max(0, left))
            data = os.read(self._err.fileno(), 65536) if ready else b""
            self.said += data
            if not data:
                self.process.kill()
                raise AssertionError(self.said.decode())
        print(self.said.decode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        deadline = time.monotonic() + LIMIT
        while b"\n" not in self._data:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._out], [], [], max(0, left))
            data = os.read(self._out.fileno(), 65536) if ready else b""
            if not data:
                raise AssertionError(f"no line came; there is {self._data!r}")
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()

    def event(self, name: str) -> dict[str, Any]:
        """The next of that tracepoint; what others there are (a guest's start) is passed over."""
        while True:
            form: dict[str, Any] = json.loads(self.line())
            if form.get("event") == name:
                return form

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, (self._data + out).decode(), err.decode()


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    """Everything, as JSON. Its end is a test, too."""
    load_sim()
    modprobe("kvm_amd")
    with Tracer("--json", "--stack", "--hold", "20") as tracer:
        yield tracer
        status, _, err = tracer.end()
        assert (status, err) == (130, "hwerr-trace: interrupted\n")


@pytest.mark.long
@pytest.mark.amd
def test_a_machine_check_next_to_its_record(tracer: Tracer) -> None:
    status = DRAM | MCI_UC
    inject.mce(MceRecord(status=status, bank=4, addr=0x12345000, misc=0x8C))
    form = tracer.event("mce:mce_record")
    fields, record = form["fields"], form["record"]
    assert (fields["status"], fields["addr"], fields["bank"]) == (hex(status), "0x12345000", 4)
    assert form["comm"].startswith("kworker")
    assert any(f.startswith("blocking_notifier_call_chain") for f in form["stack"])
    assert record["source"] == "mce"
    assert record["mce"]["status"] == hex(status)
    assert record["severity"] in ("recoverable", "fatal")
    assert record["phys_addr"] == "0x12345000"
    # Repetitions of a corrected error: two records, and a raw event for each.
    for _ in range(3):
        inject.mce(MceRecord(status=DRAM, bank=4, addr=0x12346000, misc=0x8C))
    forms = [tracer.event("mce:mce_record") for _ in range(3)]
    assert [f["record"]["severity"] for f in forms] == ["corrected"] * 3
    assert sum({f["record"]["seq"]: f["record"]["count"] for f in forms}.values()) == 3


@pytest.mark.long
@pytest.mark.amd
def test_other_sources_next_to_their_records(tracer: Tracer) -> None:
    mc, layers = inject.edac_layers("DIMM_B1")
    inject.edac("ue", mc=mc, layers=layers, page=0x12347, syndrome=0x55)
    form = tracer.event("ras:mc_event")
    assert (form["fields"]["label"], form["fields"]["error_type"]) == ("DIMM_B1", 1)
    assert (form["record"]["source"], form["record"]["edac"]["label"]) == ("edac", "DIMM_B1")

    address = inject.pci_address("aer0")
    inject.aer(AerRecord(device=address, cor_status=0x1000))
    form = tracer.event("ras:aer_event")
    assert (form["fields"]["dev_name"], form["fields"]["status"]) == (address, "0x1000")
    assert (form["record"]["pci"]["device"], form["record"]["severity"]) == (address, "corrected")

    with Victim() as victim:
        victim.poison()
        form = tracer.event("ras:memory_failure_event")
        assert form["fields"]["pfn"] == hex(victim.memory.pfn)
        assert form["record"]["source"] == "memory_failure"
        assert [t["pid"] for t in form["record"]["tasks"]] == [victim.memory.pid]

    inject.extlog("corrected", addr=0x12348000, text="slot 3")
    form = tracer.event("ras:extlog_mem_event")
    assert (form["fields"]["fru_text"], form["fields"]["pa"]) == ("slot 3", "0x12348000")
    assert (form["record"]["source"], form["record"]["severity"]) == ("cper", "corrected")

    inject.non_standard("recoverable", "11111111-2222-3333-4444-555566667777", b"abc", text="slot 4")
    form = tracer.event("ras:non_standard_event")
    assert form["fields"]["buf"].startswith(b"abc".hex())
    assert (form["record"]["source"], form["record"]["severity"]) == ("cper", "recoverable")


@pytest.mark.long
@pytest.mark.amd
def test_a_guest_that_cannot_go_on_next_to_its_record(tracer: Tracer) -> None:
    probe.unload()
    running = Service()
    try:
        with fails("emulate") as guest:
            form = tracer.event("kvm:kvm_userspace_exit")
            assert (form["pid"], form["fields"]["reason"]) == (guest.pid, 17)
            assert form["record"]["source"] == "kvm"
            assert form["record"]["guests"][0]["pid"] == guest.pid
    finally:
        running.stop()
        probe.unload()


# -- filters, counts, text: each compiles anew -----------------------------------


@pytest.mark.long
@pytest.mark.amd
def test_filters_are_in_the_probe() -> None:
    load_sim()
    with Tracer(
        "--json", "--bank", "5", "--severity", "recoverable", "--count", "1", "--no-records"
    ) as tracer:
        # The other bank, and the other severity, first.
        inject.mce_sim(MceRecord(status=DRAM | MCI_UC, bank=4, addr=1 << 20))
        inject.mce_sim(MceRecord(status=DRAM, bank=5, addr=2 << 20))
        inject.edac("ue", page=3)
        inject.mce_sim(MceRecord(status=DRAM | MCI_UC, bank=5, addr=4 << 20))
        form = json.loads(tracer.line())
        assert (form["fields"]["bank"], form["fields"]["addr"]) == (5, hex(4 << 20))
        assert tracer.process.wait(LIMIT) == 0
        assert tracer.said.count(b"mce:mce_record") == 1
        assert b"ras:" not in tracer.said, "what cannot pass is not compiled"


@pytest.mark.long
@pytest.mark.amd
def test_counts_by_dimm_and_text() -> None:
    load_sim()
    sent = {"DIMM_A1": 3, "DIMM_D2": 5}

    def send() -> None:
        for label, n in sent.items():
            mc, layers = inject.edac_layers(label)
            for page in range(n):
                inject.edac("ce", mc=mc, layers=layers, page=0x10000 + page)

    with Tracer("--hist", "dimm", "--source", "edac", "--count", "8") as tracer:
        send()
        out, _ = tracer.process.communicate(timeout=LIMIT)
        assert tracer.process.returncode == 0
    lines = out.decode().splitlines()
    assert lines[0] == "8 events by dimm"
    assert [ln.split()[:2] for ln in lines[1:]] == [["DIMM_D2", "5"], ["DIMM_A1", "3"]]
    with Tracer("--dimm", "DIMM_D2", "--count", "5") as tracer:
        send()
        out, _ = tracer.process.communicate(timeout=LIMIT)
        assert tracer.process.returncode == 0
    events = [ln for ln in out.decode().splitlines() if "ras:mc_event" in ln]
    records = [ln for ln in out.decode().splitlines() if ln.startswith("  = record ")]
    assert len(events) == len(records) == 5
    assert all("label=DIMM_D2" in ln for ln in events)
    assert all("corrected   edac    DIMM_D2" in ln for ln in records)


@pytest.mark.long
@pytest.mark.amd
def test_a_reader_that_goes_away_and_a_storm() -> None:
    load_sim()
    with Tracer("--source", "edac", "--json", "--no-records") as tracer:
        os.kill(tracer.process.pid, signal.SIGSTOP)
        inject.edac("ce", page=1, repeat=20000)
        os.kill(tracer.process.pid, signal.SIGCONT)
        seen = lost = 0
        while seen + lost < 20000:
            form = json.loads(tracer.line())
            lost += form.get("lost", 0)
            seen += "event" in form
        assert seen + lost == 20000
        assert lost, "the buffer held a storm that it cannot hold"
        tracer._out.close()
        inject.edac("ce", page=2)
        assert tracer.process.wait(LIMIT) == 141


# -- what it takes ----------------------------------------------------------------


def ends(*argv: str, **more: Any) -> tuple[int, str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=False, **more)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.amd
@pytest.mark.anywhere
def test_what_is_missing_is_said(tmp_path: Path) -> None:
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    assert ends(*nobody, "hwerr-trace") == (5, "hwerr-trace: not permitted: run as root")
    status, said = ends("hwerr-trace", "--source", "mce")
    assert status == 6
    assert said.endswith(f"apt-get install linux-headers-{os.uname().release}")
    (tmp_path / "bcc.py").write_text("raise ImportError('none')\n", "ascii")
    status, said = ends("hwerr-trace", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert status == 6
    assert "apt-get install python3-bpfcc" in said


@pytest.mark.long
@pytest.mark.amd
def test_interrupted_while_it_compiles() -> None:
    argv = ["with-headers", "hwerr-trace", "--source", "mce"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "compiling the probe for mce:mce_record" in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().splitlines()[-1] == "hwerr-trace: interrupted"
        assert process.wait(LIMIT) == 130
