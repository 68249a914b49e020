# SPDX-License-Identifier: MIT
#
# Each target is one call of something that can be called by hand.

KERNELS ?= 6.1 6.12
NO_RACES = $(filter-out tests/vm/test_races.py,$(wildcard tests/vm/test_*.py))

help:		## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo:		## set up, boot a VM, hit a guest with one error on each path, watch
	scripts/setup
	tests/vm/run --kernel 6.12 --sim -- .venv/bin/python tests/demo.py

demo-ha:	## two cluster nodes: an error under a guest on one, it runs on the other; the timeline
	scripts/setup
	.venv/bin/python tests/ha/demo.py

test:		## all tests, on every kernel of KERNELS
	scripts/setup
	.venv/bin/python scripts/test --twice --kernels "$(KERNELS)"

test-next:	## all VM tests on the kernel after those of KERNELS: 7.2, of sid
	scripts/setup
	scripts/kernel add 7.2 --suite sid
	.venv/bin/python scripts/test --no-host --kernels 7.2

test-long:	## what takes too long for `make test`: loads under a storm, races, freezing step by step
	scripts/setup
	HWERR_LONG=1 HWERR_RACES=20000 HWERR_RACES_SECONDS=5400 .venv/bin/python scripts/test --no-host --cpus amd \
		--kernels "$(KERNELS)" --timeout 7200 tests/vm/test_races.py
	HWERR_LONG=1 .venv/bin/python scripts/test --no-host --cpus amd --kernels "$(KERNELS)" --timeout 7200 \
		tests/vm/test_module.py tests/vm/test_guard.py tests/vm/test_guard_steps.py \
		tests/vm/test_guard_libvirt.py tests/vm/test_trace.py tests/vm/test_moduleless.py \
		tests/vm/test_trust.py tests/vm/test_probe_service.py tests/vm/test_watch.py
	HWERR_LONG=1 .venv/bin/python -m pytest -q -p no:cacheprovider tests/boots/test_lockdown.py
	HWERR_QEMU=$$(scripts/program trixie qemu) .venv/bin/python -m pytest -q -p no:cacheprovider tests/unit/test_guard_release.py

# What one VM may take is bounded: the races have one of their own.
test-debug:	## all VM tests on a kernel that finds faults (KASAN, lockdep, ...); the fuzzers, longer
	scripts/setup
	scripts/kernel debug
	HWERR_FUZZ_SECONDS=600 .venv/bin/python -m pytest -q -p no:cacheprovider tests/unit/test_fuzz_*.py
	HWERR_LONG=1 HWERR_RACES=20000 HWERR_RACES_SECONDS=9000 \
		.venv/bin/python scripts/test --no-host --cpus amd --kernels debug --timeout 12000 tests/vm/test_races.py
	HWERR_LONG=1 HWERR_FUZZ_SECONDS=600 .venv/bin/python scripts/test --no-host --kernels debug --timeout 7200 \
		$(NO_RACES)
	HWERR_LONG=1 HWERR_CRASH=$$(scripts/program trixie crash) \
		.venv/bin/python -m pytest -q -p no:cacheprovider tests/boots/test_crash.py

test-kcsan:	## all VM tests on a kernel that finds data races of the module (KCSAN)
	scripts/setup
	scripts/kernel kcsan
	HWERR_LONG=1 HWERR_RACES=5000 HWERR_RACES_SECONDS=5400 \
		.venv/bin/python scripts/test --no-host --cpus amd --kernels kcsan --timeout 7200 tests/vm/test_races.py
	HWERR_LONG=1 HWERR_FUZZ_SECONDS=300 .venv/bin/python scripts/test --no-host --kernels kcsan --timeout 7200 \
		$(NO_RACES)

test-ha:	## failovers of a FROZEN guest in a cluster of two VMs, without fencing
	scripts/setup
	.venv/bin/python -m pytest -q -rs -s -p no:cacheprovider --timeout 3600 tests/ha

test-install:	## `make install` on a Debian 12 of its own: build, load, use, uninstall (root)
	scripts/setup
	.venv/bin/python -m pytest -q -rs -p no:cacheprovider tests/packaging

check:		## style and types, without a VM (part of `make test`)
	scripts/setup
	scripts/check

bench:		## measure, and put the tables into README.md
	scripts/setup
	.venv/bin/python scripts/bench

bench-freeze:	## measure freezing a VM, and put the table into README.md
	scripts/setup
	.venv/bin/python scripts/bench --freeze

bench-probes:	## measure what hwerr-probe costs guests and disks, and put the table into README.md
	scripts/setup
	.venv/bin/python scripts/bench --probes --mem 3G

bench-peers:	## hwerr beside rasdaemon, trace_pipe, perf and QEMU: docs/benchmarks.md
	scripts/setup
	.venv/bin/python scripts/bench-peers

setup:		## what test and demo need, and nothing else
	scripts/setup

module:		## the module for the running kernel, in kmod/
	$(MAKE) -C /lib/modules/$(shell uname -r)/build M=$(CURDIR) modules

install:	## module (DKMS), Python package, udev rule, man pages, on this host
	packaging/install

uninstall:	## and off again
	packaging/install --remove

clean:		## what was built here
	rm -rf build
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help demo demo-ha test test-next test-long test-debug test-kcsan test-ha test-install check bench bench-freeze bench-probes bench-peers setup module install uninstall clean
.DEFAULT_GOAL := help
