# Linux, Python 3.11 or newer. `make demo` and `make test` each do all set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIN := constraints/cpu.txt
# Tests that run at once: each takes a core and up to 3 GB.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
# Where torch comes from, and it alone: auto = PyTorch's index unless pip finds the CPU build without.
TORCH_INDEX ?= auto

.PHONY: help demo monitor-demo loadtest test nightly lint format install benchmark clean
help:
	@echo "make demo       exact and re-routed on a CPU: loss, speed, answers as served"
	@echo "make monitor-demo  the demo under load with Prometheus beside it, until Ctrl-C"
	@echo "make loadtest   latency and cost of the demo, exact and re-routed, through HTTP"
	@echo "make test       lint, types and all tests that run on this machine"
	@echo "make nightly    the slow tests that make test leaves out"
	@echo "make lint       ruff and mypy"
	@echo "make benchmark  decode step time on CPU, stock against this plugin (writes docs/results)"
	@echo "make clean      remove $(VENV) and caches"

demo: $(STAMP)
	$(BIN)/sere-ray demo --json demo-report.json --html demo-report.html $(ARGS)

monitor-demo: $(STAMP)
	$(BIN)/sere-ray monitor-demo $(ARGS)

loadtest: $(STAMP)
	$(BIN)/sere-ray loadtest demo --out loadtest-report.json --html loadtest-report.html $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

nightly: $(STAMP)
	$(PYTEST) -m nightly $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

benchmark: $(STAMP)
	$(BIN)/sere-ray bench step-time --eager --repeats 15 --out docs/results/step-time-cpu.json $(ARGS)

install: $(STAMP)

$(STAMP): $(PIN) constraints/install_cpu.py pyproject.toml
	@test "$$(uname -s)" = Linux || { echo "error: sere-ray runs on Linux; use a container or WSL2"; exit 2; }
	@$(PYTHON) -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "error: Python 3.11, 3.12 or 3.13 with venv is needed; set PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
	  { echo "error: libnuma.so.1 is not there, which vLLM links (Debian, Ubuntu: apt install libnuma1)"; exit 2; }
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  echo "no C++ compiler found (Debian: apt install g++): vLLM will run without its compiled graph"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned CPU stack into $(VENV): some minutes, 4 GB"
	@TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python constraints/install_cpu.py
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
