# Set-up is `make demo` and `make test`; both make .venv first. `make test-gpu` and `make gpu` use the python3 that has the GPU's torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= auto

# Of `make gpu`.
MINUTES ?= 9
# Of `make test-long`: which of the parts of large tables, a day's own unless it is said; 1/1 is all of them.
PART ?= $(shell expr $$(date +%s) / 86400 % 6 + 1)/6
# Of `make mutants`: as many drawn ones in place of those listed.
DRAWN ?= 0
SEED ?= 0

# Of `make test-peers`: where the libraries are installed, and a folder with clones of their repositories, whose own tests
# of these classes run too (pytorch_geometric: git clone --branch 2.8.0.post1; torchmil).
PEERS ?= build/peers
UPSTREAM ?= build/upstream

.PHONY: demo test test-fast test-long test-devices test-peers test-gpu gpu mutants bench bench-guard lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m bench.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS)

test-fast: $(VENV)/.installed # a fair eighth of the tests of every file, for every edit
	$(BIN)/python -m pytest -n $(JOBS) --sample 1/8

test-long: $(VENV)/.installed # what is too long for every day, and of large tables another part each day
	$(BIN)/python -m pytest -n $(JOBS) --long -m long --rest $(PART)

test-devices: $(VENV)/.installed # on a CPU: which kernel tests make tensors that a GPU's kernel would not take
	$(BIN)/python -m pytest -n $(JOBS) --devices -m kernel

$(PEERS)/.installed: tests/peers/requirements.txt tests/peers/needs.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(PEERS) \
		-r tests/peers/requirements.txt -r tests/peers/needs.txt
	touch $@

test-peers: $(PEERS)/.installed # fused_attn.compat beside the libraries themselves; one that is not there is a failure
	PYTHONPATH=$(abspath $(PEERS)) FUSED_ATTN_PEERS=1 FUSED_ATTN_UPSTREAM=$(abspath $(UPSTREAM)) \
		$(BIN)/python -m pytest -n $(JOBS) tests/peers

test-gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest --gpu

gpu: # tests, speed, counters and sanitizer of a GPU in so many minutes
	$(PYTHON) -m bench.gpu --minutes $(MINUTES)

mutants: $(VENV)/.installed # the tree broken in many ways: does a test see each?
	$(BIN)/python tests/mutants --drawn $(DRAWN) --seed $(SEED)

bench: $(VENV)/.installed
	$(BIN)/python -m bench.run

bench-guard: $(VENV)/.installed # on a CPU, alone on the machine: is what the newest stored run had still there?
	$(BIN)/python -m bench.cpu --guard

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_output models_output
