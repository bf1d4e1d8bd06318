# Two commands do all the set-up: `make demo` and `make test`.
#
#   PYTHON=python3.12   the interpreter that the environment is made from
#   PIP_ARGS=...        more arguments for pip, such as a CPU index for torch (README, Install)
#   SKIP_INSTALL=1      make no environment: run on PYTHON's own packages (a GPU host with its own torch)

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv

ifeq ($(SKIP_INSTALL),1)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/installed
endif

# Quiet, local and repeatable: no usage statistics, no question about an accelerator, no hub.
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-fast test-gpu lint install clean

install: $(READY)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(READY)
	$(PY) -m jobs.demo

test: $(READY) lint
	$(PY) -m pytest -m "not gpu" --durations=15

test-fast: $(READY)
	$(PY) -m pytest -m "not gpu and not slow and not ray"

test-gpu: $(READY)
	$(PY) -m pytest -m gpu

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
