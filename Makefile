# Needs Python 3.11+, make and a package index. `make demo` and `make test` build .venv first when it is missing.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
MIN_VENV := .venv-min
MIN_STAMP := $(MIN_VENV)/.installed
SOURCES := specdec drafters trees verify training kernels bench
# Work in small tensors: more threads than workers only fight for the cores.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

# True where the interpreter already has a CUDA build of torch in the supported range; such a torch is kept.
HAS_CUDA_TORCH := -c 'import re, torch; v = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])); \
	raise SystemExit(0 if torch.version.cuda and v >= (2, 11) else 1)'

# On a GPU machine: the Python that is there, no venv, nothing downloaded. RESULTS: a folder, bench/results/<gpu> by default.
RESULTS ?=
GPU = PYTHONPATH=$(CURDIR) $(PYTHON) -P -m specdec.bench.gpu
GPU_ARGS = $(if $(RESULTS),--results $(RESULTS))

.PHONY: demo install test test-fast test-all test-min lint format types bench-speed clean
.PHONY: gpu gpu-tests gpu-kernels gpu-step gpu-decode

demo: $(STAMP)
	$(PY) -P -m specdec demo

install: $(STAMP)

test: $(STAMP)
	$(PYTEST) -n 2 -q -m "not nightly"

test-fast: $(STAMP)
	$(PYTEST) -n 2 -q -m "not slow and not nightly"

test-all: $(STAMP)
	$(PYTEST) -n 2 -q

test-min: $(MIN_STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(MIN_VENV)/bin/python -m pytest -n 2 -q -m "not nightly"

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# mypy follows no package-dir map, so it is shown the layout of the wheel: links, made anew each time.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types/specdec
	ln -s $(CURDIR)/specdec/*.py $(CURDIR)/specdec/py.typed build/types/specdec/
	ln -s $(addprefix $(CURDIR)/,$(filter-out specdec,$(SOURCES))) build/types/specdec/
	cd build/types && $(CURDIR)/$(PY) -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p specdec

bench-speed: $(STAMP)
	$(PY) -P -m specdec.bench.speed

gpu: gpu-tests gpu-kernels gpu-step gpu-decode

gpu-tests:
	$(GPU) tests $(GPU_ARGS)

gpu-kernels:
	$(GPU) kernels $(GPU_ARGS)

gpu-step:
	$(GPU) step $(GPU_ARGS)

gpu-decode:
	$(GPU) decode $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(SOURCES) tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; raise SystemExit(0 if sys.version_info >= (3, 11) else "specdec needs Python 3.11 or newer")'
	@test -x $(PY) || if $(PYTHON) $(HAS_CUDA_TORCH) 2>/dev/null; \
		then $(PYTHON) -m venv --system-site-packages $(VENV); \
		else $(PYTHON) -m venv $(VENV); fi
	@if $(PY) $(HAS_CUDA_TORCH) 2>/dev/null; \
		then grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(VENV)/constraints.txt; \
		else cp constraints.txt $(VENV)/constraints.txt; fi
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@

$(MIN_STAMP): pyproject.toml constraints-min.txt
	test -x $(MIN_VENV)/bin/python || $(PYTHON) -m venv $(MIN_VENV)
	$(MIN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-min.txt -e ".[dev]"
	@touch $@
