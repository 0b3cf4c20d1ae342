# Everything runs from here; nothing is installed outside .venv.
PYTHON ?= python3
CONFIG ?= configs/demo.yaml
BIN := .venv/bin

.PHONY: demo serve test test-cluster test-all check clean

demo: .venv/.base ## the demo model on this machine: a router, two expert shards, two streamed answers
	$(BIN)/python -m deploy.cli.demo

serve: .venv/.base ## serve CONFIG=configs/... in the foreground
	$(BIN)/sparkmoe serve $(CONFIG)

# Two files at a time, in their order: the longest come early.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.dev ## unit tests, and one server from its start to its stop
	$(BIN)/pytest $(PARALLEL) tests/e2e tests/unit # what plain `pytest` runs; the other folders need not be read

test-cluster: .venv/.dev ## everything else that starts a Ray cluster
	$(BIN)/pytest -m "cluster and not gpu"

test-all: test ## everything that needs no GPU: the whole matrices and the clusters, too
	$(BIN)/pytest -m "slow and not cluster and not gpu" $(PARALLEL)
	$(BIN)/pytest -m "cluster and not gpu"

# pyright asks our Python where packages are: cutlass-dsl's .pth file runs code.
check: .venv/.dev ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv

# torch goes first and alone: any looser request for it may fetch another, larger build.
.venv/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "sparkmoe needs Python 3.11, 3.12 or 3.13")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/.base: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
