# Two commands do all the set-up: `make demo` and `make test`.
#
#   PYTHON=python3.12   the interpreter that the environment is made from
#   PIP_ARGS=...        more arguments for pip, such as a CPU index for torch (README, Install)
#   ARGS=...            overrides for the demo: make demo ARGS="run.seed=7 launch.use_gpu=false"
#   SKIP_INSTALL=1      make no environment: run on PYTHON's own packages (a GPU host with its own torch)

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
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

.PHONY: demo test test-fast test-gpu chaos lint install clean clean-runs

install: $(READY)

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about 3 GB, 2-3 minutes; pip shows errors only"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(READY)
	$(PY) -m jobs.demo $(ARGS)

test: $(READY) lint
	# Two processes, a file to one of them: most of the time of the ray tests is waiting for Ray to start.
	$(PY) -m pytest -m "not gpu and not chaos" --durations=15 -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)
	$(PY) -m pytest -m "not gpu and not chaos and not slow and not ray"

test-gpu: $(READY)
	$(PY) -m pytest -m gpu

# Every fault to a run under every ZeRO stage, and nodes that come and go; writes the table of docs/faults.md.
# About 40 minutes on two cores; a cell that fails does not stop the others. Root is needed for the full disk.
chaos: $(READY)
	$(PY) -m pytest -s -m chaos tests/chaos

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

# The environment and caches. What was trained stays: clean-runs removes that.
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Every run folder below runs/, checkpoints and caches of latents included.
clean-runs:
	rm -rf runs
