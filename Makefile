# Needs Python >= 3.11 with venv, a C++17 compiler and make; the rest comes from the package index into .venv.
#   make demo      set up, quantize the sample model, shard it for 2 ranks, generate text on 2 ranks
#   make test      set up with the extras deepspeed, mpi and ccl, run the quick tests
#   make test-all  every test; writes docs/test-all.md
#   make wheel     dist/dist_lowbit-*-py3-none-linux_*.whl
#   make lint      ruff, mypy --strict, clang-format; make format mends what they can mend
#   make emulated build the kernels for tests of ISAs that the processor lacks; needs SIMDe (libsimde-dev)
#   make sanitize  the kernels with AddressSanitizer and UBSan, every buffer against a page that may not be touched
#   make clean     remove everything that these made
# Variables: PYTHON, PIP_ARGS (options for pip install), PYTEST_ARGS, SANITIZE (of the kernels: address,undefined or thread)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# mpirun of impi-rt and deepspeed look for their helpers on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

INSTALL := $(BIN)/pip install --quiet -c constraints.txt $(PIP_ARGS)
BUILD := $(INSTALL) --no-build-isolation -e . -C cmake.define.DLB_SANITIZE=$(SANITIZE)
ifdef SANITIZE
# At -O3 each ISA's file would compile for minutes. Python is not built with the sanitizer, so its runtime comes first.
BUILD += -C cmake.build-type=Debug
RUNTIMES = $(foreach name,$(if $(findstring thread,$(SANITIZE)),tsan,$(if $(findstring address,$(SANITIZE)),asan) ubsan),$(shell $(CXX) -print-file-name=lib$(name).so))
CHECKED = LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0
endif
EXTRAS := deepspeed mpi serve test dev
# The extra ccl, and whisper, without what they declare and we never use: oneCCL on CPUs needs no SYCL runtime (1.9 GB),
# whisper no triton.
SLIM := oneccl-devel tcmlib intel-cmplr-lib-rt openai-whisper

KERNELS := CMakeLists.txt $(shell find kernels/cpu -type f 2>/dev/null)
STRICT := core formats comm parallel checkpoint launcher
CXX_FILES = $(shell git ls-files -co --exclude-standard 'kernels/*.cpp' 'kernels/*.h')
SAMPLE := dist_lowbit/sample/storyteller
DEMO := demo-out

.PHONY: help demo set-up-test emulated sanitize test test-all wheel lint lint-ruff lint-mypy lint-cxx format clean

help:
	@sed -n 's/^#   //p; s/^# \(Variables.*\)/\1/p' Makefile

# Stamps, so that a second call does nothing. The project is built without isolation: an isolated build starts from
# nothing each time, this one compiles what has changed.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}, expected 3.11 or newer; name another with make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing dist_lowbit and what it needs into $(VENV); the first time takes minutes"
	$(INSTALL) scikit-build-core cmake ninja
	$(BUILD)
	@touch $@ $(VENV)/.kernels

$(VENV)/.kernels: $(VENV)/.base $(KERNELS)
	$(BUILD) --no-deps
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "Installing the extras $(EXTRAS) ccl into $(VENV)"
	@$(BIN)/python -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")' $(EXTRAS) > $(VENV)/extras.txt
	$(INSTALL) -r $(VENV)/extras.txt
	$(INSTALL) --no-deps $(SLIM)
	@touch $@

demo: $(VENV)/.kernels
	rm -rf $(DEMO)
	$(BIN)/dist-lowbit convert $(SAMPLE) $(DEMO) --low-bit sym_int4 --tp 2
	$(BIN)/dist-lowbit generate $(DEMO) -n 2 --prompt "Once upon a time" --max-new-tokens 48

# The set-up of make test alone.
set-up-test: $(VENV)/.test $(VENV)/.kernels emulated

# Without SIMDe the tests of emulated kernels are skipped, and say so. At -O3 these would compile for minutes.
emulated: $(VENV)/.base
	@if echo '#include <simde/x86/avx512.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1; then \
	    $(BIN)/cmake -S kernels/cpu -B build/emulated -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DDLB_EMULATE=ON \
	        -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 --log-level=WARNING && \
	    $(BIN)/cmake --build build/emulated -- --quiet; \
	else echo "no <simde/x86/avx512.h> (Debian: libsimde-dev): the tests of emulated kernels will be skipped"; fi

# A driver in C++: no Python, no preloaded runtime.
sanitize: $(VENV)/.base
	$(BIN)/cmake -S kernels/cpu -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DDLB_TESTS=ON \
	    -DDLB_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" --log-level=WARNING
	$(BIN)/cmake --build build/sanitize --target dlb_guarded -- --quiet
	build/sanitize/dlb_guarded

test: $(VENV)/.test $(VENV)/.kernels emulated
	$(CHECKED) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.test $(VENV)/.kernels emulated
	$(BIN)/python -m pytest --slow --record docs/test-all.md $(PYTEST_ARGS)

wheel: $(VENV)/.python
	# A build folder of its own: the one of the editable install may hold sanitized objects.
	$(BIN)/pip wheel --quiet --no-deps $(PIP_ARGS) -w dist . -C build-dir=build/wheel
	@ls -l dist/*.whl

# Separate, so that `make --keep-going lint` shows what each of them finds.
lint: lint-ruff lint-mypy lint-cxx

lint-ruff: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-mypy: $(VENV)/.test
	$(BIN)/mypy $(STRICT:%=-p dist_lowbit.%)

lint-cxx: $(VENV)/.test
	@test -z '$(CXX_FILES)' || $(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.test
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	@test -z '$(CXX_FILES)' || $(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
