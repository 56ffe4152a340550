# `make run` and `make test` do all set-up themselves: an environment of their own with torch and
# the build tools, the package built into it, then the job. A second run only repeats the job.
#
#   make run ARGS="--gamma 0.9"   sparse prefill attention against dense, on this machine
#   make test PYTEST_ARGS="-x"    every test, Python and C++
#   make bench                    every benchmark
#   make lint | format            check the style, or put it right
#   make clean                    forget everything that was built and installed
#
# Variables: PYTHON, VENV, CUDA=auto|on|off, TORCH (a pip requirement), PIP_TORCH_ARGS (arguments of
# the pip that installs torch).

PYTHON ?= python3
VENV ?= .venv
CUDA ?= auto
BUILD ?= build/cmake
ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

# CUDA kernels need a compiler to build them and, by default, a driver to run them.
ifeq ($(CUDA),auto)
  override CUDA := $(if $(shell nvidia-smi -L 2>/dev/null && command -v nvcc),on,off)
endif
ifeq ($(CUDA),on)
  TORCH ?= torch>=2.13
  PIP_TORCH_ARGS ?=
else ifeq ($(CUDA),off)
  TORCH ?= torch==2.13.0
  PIP_TORCH_ARGS ?= auto
else
  $(error CUDA must be auto, on or off, got $(CUDA))
endif

# torch's own index has builds without CUDA, a tenth of the size. It is asked once whether it can be
# reached: pip would wait for it again and again, for every package.
CPU_INDEX := https://download.pytorch.org/whl/cpu
REACH_CPU_INDEX = timeout 4 $(BIN)/python -c \
  'import urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=3)' 2>/dev/null
CPU_INDEX_ARGS = $$($(REACH_CPU_INDEX) && echo --extra-index-url $(CPU_INDEX) || \
  echo "going on without $(CPU_INDEX), which did not answer" >&2)

BUILD_TOOLS := setuptools>=64 wheel pybind11>=2.12 ninja cmake>=3.24
LINT_TOOLS := ruff==0.17.6 clang-format==19.1.7
EXTRAS := hf,plot,test

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_FILES := $(shell find csrc include tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc include python tests/cpp bench -type f -not -name '*.so' -not -path '*/__pycache__/*' -not -path '*.egg-info/*') \
          CMakeLists.txt setup.py pyproject.toml

export PATH := $(BIN):$(PATH)
export PROXYATTN_CUDA := $(if $(filter on,$(CUDA)),ON,OFF)
export PROXYATTN_BUILD_DIR := $(abspath $(BUILD))
export PROXYATTN_TESTS := ON
export PROXYATTN_BENCH := ON
unexport PYTHONPATH

.PHONY: run test bench install cpu-index-args lint format clean FORCE
.DELETE_ON_ERROR:

run: install
	$(BIN)/python -m proxyattn $(ARGS)

test: install
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: install
	cmake --build $(BUILD)
	for bench in $(BUILD)/bench/bench_*; do $$bench $(BENCH_ARGS) || exit 1; done

install: $(VENV)/installed

# ---- the environment

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "proxyattn: Python 3.10 or later is needed, got $$($(PYTHON) --version); set PYTHON"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Holds what was asked for, and changes only when that does.
$(VENV)/wanted: $(BIN)/python FORCE
	@echo '$(CUDA) $(TORCH) $(PIP_TORCH_ARGS)' | cmp -s - $@ || echo '$(CUDA) $(TORCH) $(PIP_TORCH_ARGS)' > $@

$(VENV)/torch: $(VENV)/wanted
	$(PIP) install --quiet $(BUILD_TOOLS:%='%')
	$(PIP) install '$(TORCH)' $(if $(filter auto,$(PIP_TORCH_ARGS)),$(CPU_INDEX_ARGS),$(PIP_TORCH_ARGS))
	touch $@

# The list of files, so that one taken away counts as a change too.
$(VENV)/sources: $(BIN)/python FORCE
	@printf '%s\n' $(sort $(SOURCES)) | cmp -s - $@ || printf '%s\n' $(sort $(SOURCES)) > $@

# The last line fails unless the extension loads with the torch that is installed.
$(VENV)/installed: $(VENV)/torch $(VENV)/sources $(SOURCES)
	@echo "building proxyattn, which takes a few minutes the first time"
	$(PIP) install --quiet --no-build-isolation '.[$(EXTRAS)]'
	$(BIN)/python -c 'import proxyattn; proxyattn.show_config()'
	touch $@

$(VENV)/lint: $(BIN)/python Makefile
	$(PIP) install --quiet $(LINT_TOOLS)
	touch $@

# What the pip that installs a torch without CUDA is told of its index.
cpu-index-args: $(BIN)/python
	@echo "$(CPU_INDEX_ARGS)"

# ---- style

lint: $(VENV)/lint
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/lint
	@$(BIN)/clang-format -i $(CXX_FILES)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build python/*.egg-info
