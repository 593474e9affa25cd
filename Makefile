# Two commands do everything on a fresh Debian machine with root: `make demo` and `make test`.
# Everything that is installed goes into .venv, at the versions and hashes of requirements*.lock, or comes from apt.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0
# Four workers on two cores: most of a scenario's time is waiting for packets that are dropped on purpose.
WORKERS ?= 4

# Another kernel for the tests in a virtual machine: `make test-vm KERNEL=6.12`; see tests/vm/README.md.
VM = $(BIN)/python -m tests.vm $(if $(KERNEL),--kernel $(KERNEL)) $(VM_OPTIONS)
# Files are named, as collecting all tests costs a guest a minute.
VM_PYTEST = $(BIN)/python -m pytest -v -p no:cacheprovider -p no:xdist -o faulthandler_timeout=300 \
	--junitxml={results}/junit.xml tests/netns/test_scenarios.py tests/netns/test_ipset_kernel.py tests/netns/test_ipvs_kernel.py
# Restarts and an upgrade in mode ipvs, and what the wire and netlink show of it.  Test files name groups of xdist's.
VM_RESTARTS = $(BIN)/python -m pytest -v -p no:cacheprovider -o faulthandler_timeout=1200 --junitxml={results}/junit.xml \
	tests/netns/test_upgrade.py tests/netns/test_ipvs_arp.py -k "ipvs or writes"

.PHONY: help install install-iptables demo test test-page bench-page test-vm test-all vm-shell kube-proxy check format bench bench-ipvs lock fuzz soak dist deb image clean

help:                ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(VENV)/bin/python:
	@if ! $(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "==> python3 with venv, from apt"; $(APT) update; $(APT) install -y --no-install-recommends python3 python3-venv >/dev/null; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sluice needs Python 3.11 or newer; this is $$($(PYTHON) --version)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/python
	@echo "==> the packages that sluice runs with, into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes --only-binary :all: -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@echo "==> the tools of tests and checks, into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes -r requirements-dev.lock
	@touch $@

# Programs that the tests run: nft (listing and loading our rules), iptables of both kinds (mode iptables writes with them),
# openssl (certificates of the stand-in API server), ipset and ipvsadm (whether they see what mode ipvs writes).
$(VENV)/.installed-programs: | $(VENV)/bin/python
	@missing=; command -v nft >/dev/null || missing="$$missing nftables"; command -v openssl >/dev/null || missing="$$missing openssl"; \
	command -v ip >/dev/null || missing="$$missing iproute2"; command -v iptables-nft >/dev/null || missing="$$missing iptables"; \
	command -v ipset >/dev/null || missing="$$missing ipset"; command -v ipvsadm >/dev/null || missing="$$missing ipvsadm"; \
	command -v sysctl >/dev/null && command -v ps >/dev/null || missing="$$missing procps"; \
	if [ -n "$$missing" ]; then echo "==> from apt:$$missing"; $(APT) update; $(APT) install -y --no-install-recommends $$missing >/dev/null; fi
	@touch $@

install: $(VENV)/.installed  ## sluice and what it runs with, into .venv: then .venv/bin/sluice works

install-iptables: $(VENV)/.installed-dev  ## python-iptables for one more test of mode iptables: it is compiled, so gcc and Python's headers are needed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps "python-iptables == 1.2.0"

demo: $(VENV)/.installed  ## a cluster in network namespaces, with real packets
	@$(BIN)/sluice demo

test: $(VENV)/.installed-dev $(VENV)/.installed-programs  ## unit tests, and scenarios on real packets (root)
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

# A browser for the page about Services; `make test` leaves these tests out where there is none.
$(VENV)/.installed-browser: | $(VENV)/bin/python
	@missing=; command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v chromedriver >/dev/null || missing="$$missing chromium-driver"; \
	fc-list 2>/dev/null | grep -q . || missing="$$missing fontconfig fonts-dejavu-core"; \
	if [ -n "$$missing" ]; then echo "==> from apt:$$missing"; $(APT) update; $(APT) install -y --no-install-recommends $$missing >/dev/null; fi
	@touch $@

test-page: $(VENV)/.installed-dev $(VENV)/.installed-programs $(VENV)/.installed-browser  ## the page /debug/services in a headless Chromium (root)
	@$(BIN)/python -m pytest -q tests/netns/test_page.py

bench-page: $(VENV)/.installed-dev $(VENV)/.installed-browser  ## the page at 10,000 Services, in a headless Chromium (root)
	@$(BIN)/python -m bench.page $(BENCH_PAGE)

test-vm: $(VENV)/.installed-dev $(VENV)/.installed-programs  ## the widest scenarios on a stock Debian kernel, in modes nftables and ipvs (KERNEL=6.12 for another)
	@$(VM) --deadline 600 $(VM_PYTEST) -m vm
	@SLUICE_TEST_MODE=ipvs $(VM) --deadline 600 $(VM_PYTEST) -m vm -k test_scenario

test-all: test  ## everything that test runs, all scenarios in modes iptables (by both kinds of programs) and userspace, and in modes nftables and ipvs on a stock kernel
	@for programs in nft legacy; do SLUICE_TEST_MODE=iptables SLUICE_IPTABLES=$$programs \
		$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup tests/netns/test_scenarios.py || exit 1; done
	@SLUICE_TEST_MODE=userspace $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup tests/netns/test_scenarios.py
	@$(VM) --deadline 3600 $(VM_PYTEST)
	@SLUICE_TEST_MODE=ipvs $(VM) --deadline 5400 $(VM_PYTEST) tests/netns/test_ipvs_dataplane.py
	@$(VM) --deadline 2400 $(VM_RESTARTS)

vm-shell: $(VENV)/.installed-dev $(VENV)/.installed-programs  ## a shell on a stock Debian kernel, over this file system
	@$(VM) --shell

kube-proxy:          ## the real kube-proxy 1.20 for the tests beside it, from Debian's source: KUBE_PROXY_BIN=.kube-proxy/kube-proxy
	@tests/kube_proxy/build .kube-proxy

bench: $(VENV)/.installed-dev $(VENV)/.installed-programs  ## time and memory at 1,000 to 50,000 Services; userspace against HAProxy (root; SIZES=1000 for less)
	@command -v haproxy >/dev/null || { echo "==> from apt: haproxy"; $(APT) update; $(APT) install -y --no-install-recommends haproxy >/dev/null; }
	@$(BIN)/python -m bench $(if $(SIZES),--sizes $(SIZES)) $(BENCH)
	@$(BIN)/python -m bench.userspace $(BENCH_USERSPACE)

bench-ipvs: $(VENV)/.installed-dev $(VENV)/.installed-programs  ## mode ipvs beside ipvsadm, as ratios in a virtual machine (BENCH_IPVS="--sizes 1000")
	@$(VM) --deadline 1800 $(BIN)/python -m bench.ipvs --out {results}/bench-ipvs.json $(BENCH_IPVS)

$(VENV)/.installed-fuzz: requirements-fuzz.lock $(VENV)/.installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes -r requirements-fuzz.lock
	@touch $@

fuzz: $(VENV)/.installed-fuzz  ## the decoders on arbitrary bytes: hypothesis, then a minute of atheris each, and a table (FUZZ="--seconds 600")
	@$(BIN)/python -m tests.fuzz $(FUZZ)

soak: $(VENV)/.installed $(VENV)/.installed-programs  ## 10 minutes of changes: flat memory, no drift (root; SOAK="--seconds 60" for less)
	@$(BIN)/python -m bench.soak $(SOAK)

check: $(VENV)/.installed-dev  ## style, types, and who imports whom
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## let ruff lay out the code
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: $(VENV)/.installed-dev  ## new versions into requirements*.lock
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --extra build -o requirements.lock pyproject.toml
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes -c requirements.lock -o deploy/requirements.lock pyproject.toml
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --extra build --extra test --extra check --extra userspace -c requirements.lock -o requirements-dev.lock pyproject.toml
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --extra fuzz -c requirements-dev.lock -o requirements-fuzz.lock pyproject.toml

# What a release consists of; docs/versioning.md says how one is made.
VERSION = $(shell sed -n 's/^version = "\([^"]*\)".*/\1/p' pyproject.toml)
WHEEL = dist/sluice_proxy-$(VERSION)-py3-none-any.whl
ENGINE ?= $(firstword $(foreach each,buildah podman docker,$(if $(shell command -v $(each)),$(each))))

dist: $(VENV)/.installed  ## wheel and source distribution into dist/, the wheel tried in an empty environment
	@mkdir -p dist && rm -f dist/sluice_proxy-*
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 315532800) $(BIN)/hatchling build -d dist -t sdist -t wheel
	@PYTHON=$(BIN)/python deploy/try-wheel $(WHEEL)

deb: dist            ## a Debian package with its own environment under /opt/sluice, into dist/
	@PYTHON=$(BIN)/python deploy/debian/build $(WHEEL) dist

image:               ## the container image sluice:VERSION, with buildah, podman or docker (ENGINE=, IMAGE_OPTIONS=)
	@$(ENGINE) build $(IMAGE_OPTIONS) $(if $(filter docker,$(ENGINE)),,--ignorefile deploy/image/Containerfile.dockerignore) \
		-f deploy/image/Containerfile -t sluice:$(VERSION) .

clean:               ## remove .venv and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
