# Each target sets up what it needs: a fresh Debian 12 with make is enough.

.PHONY: install wheels deb deb-test pictures help setup demo test bench fuzz mutate repeat past storage fleet asan tsan lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    a minute on a real mount, each command with its output: Linux boots, forks, goes back"
	@echo "make test    all tests (make test ARGS='-k name' for some)"
	@echo "make bench   benchmarks, each against a named peer"
	@echo "make fuzz    random instructions, the emulator against the host CPU (ARGS='--seconds 60 --seed 7')"
	@echo "make mutate  faults planted in the translator: its tests find each (takes long)"
	@echo "make repeat  boots that are the same: twice, and by host code and the interpreter; state compared every 10 M instructions"
	@echo "make past    lives that are disturbed and lives that are not: snapshots, forks, saved machines, history; state compared every million instructions"
	@echo "make storage each storage device under Linux: blocks are written, read and compared, then it is partitioned, formatted, and the root"
	@echo "make fleet   thousands of cases on four workers of a Dask cluster, while workers are killed and a network is cut"
	@echo "make asan    all tests, under AddressSanitizer and UBSan"
	@echo "make tsan    tests of what has threads in C, under ThreadSanitizer"
	@echo "make lint    ruff"
	@echo "make setup   what the others need: system packages (Debian), .venv, the C extensions"
	@echo "make wheels  wheels for pip into dist/, one for each Python that is here"
	@echo "make deb     a Debian package into dist/"
	@echo "make deb-test installs it in a fresh Debian, uses it, and purges it (root, mmdebstrap)"
	@echo "make pictures makes those of the web page again, in Chromium (docs/web)"
	@echo "make install the command, man pages and completions, under PREFIX (/usr/local)"
	@echo "make clean   removes what was built"

setup:
	@scripts/setup.sh

demo:
	@scripts/setup.sh demo
	@scripts/demo.sh

test: setup
	@scripts/test.sh $(ARGS)

bench: setup
	@.venv/bin/python -m bench $(ARGS)

fuzz: setup
	@PYTHONPATH=tests .venv/bin/python -m emulator.fuzzing $(ARGS)

mutate: setup
	@PYTHONPATH=tests .venv/bin/python -m emulator.mutate $(ARGS)

repeat: setup
	@scripts/fetch_bench.sh || true
	@VMFS_REPEAT_STEP=10000000 .venv/bin/pytest tests/pc/test_repeats.py tests/pc/test_both_ways.py tests/pc/test_self_checks.py $(ARGS)
	@VMFS_REPEAT_STEP=10000000 VMFS_JIT_THRESHOLD=0 .venv/bin/pytest tests/pc/test_firmware.py tests/pc/test_self_checks.py $(ARGS)

past: setup
	@PYTHONPATH=tests .venv/bin/python -m pc.undisturbed --guest walker --cpus 1 --most 300000000 $(ARGS)
	@PYTHONPATH=tests .venv/bin/python -m pc.undisturbed --guest walker --cpus 3 --most 300000000 $(ARGS)
	@PYTHONPATH=tests .venv/bin/python -m pc.undisturbed --cpus 1 $(ARGS)
	@PYTHONPATH=tests .venv/bin/python -m pc.undisturbed --cpus 4 $(ARGS)

storage: setup
	@PYTHONPATH=tests .venv/bin/python -m pc.storage $(ARGS)

fleet: setup
	@PYTHONPATH=tests .venv/bin/python -m fleet.proof $(ARGS)

asan: setup
	@scripts/asan.sh $(ARGS)

tsan: setup
	@scripts/tsan.sh $(ARGS)

lint: setup
	@.venv/bin/ruff check .

# Man pages and completions, and the command as it is here. DESTDIR and PREFIX as everywhere.
PREFIX ?= /usr/local
SHARE = $(DESTDIR)$(PREFIX)/share
install: setup
	@.venv/bin/python scripts/pages.py build/pages
	install -d $(DESTDIR)$(PREFIX)/bin $(SHARE)/man/man1 $(SHARE)/bash-completion/completions
	install -d $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	ln -sfn $(CURDIR)/.venv/bin/vmfs $(DESTDIR)$(PREFIX)/bin/vmfs
	install -m 644 build/pages/*.1 $(SHARE)/man/man1
	install -m 644 build/pages/vmfs.bash $(SHARE)/bash-completion/completions/vmfs
	install -m 644 build/pages/vmfs.zsh $(SHARE)/zsh/site-functions/_vmfs
	install -m 644 build/pages/vmfs.fish $(SHARE)/fish/vendor_completions.d/vmfs.fish

wheels:
	@scripts/wheels.sh $(ARGS)

deb: setup
	@scripts/deb.sh

deb-test: deb
	@scripts/deb_test.sh

pictures: setup
	@.venv/bin/python scripts/pictures.py

clean:
	rm -rf build dist .cache .venv .pytest_cache .hypothesis *.egg-info
	find vmfs -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
