# The project's commands; `make` alone lists them.
PYTHON ?= python3
SEEDS ?= 1 2 3 4 5
RECIPE ?= $(basename $(notdir $(wildcard recipes/*.yaml)))
BIN := .venv/bin
INSTALLED := .venv/.installed
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

.DEFAULT_GOAL := help
.PHONY: help venv train test chaos lint types check docs results clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## make .venv with lit_rl, its dependencies and the development tools (PYTHON=python3.11)

$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python $(NEW_ENOUGH) 2>/dev/null || $(PYTHON) $(NEW_ENOUGH) 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found="not found"; \
	  echo "make venv: $(PYTHON) is $$found: expected Python 3.11 or newer. Name one: make venv PYTHON=python3.11" >&2; \
	  exit 1; }
	@$(BIN)/python $(NEW_ENOUGH) 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "make venv: installs PyTorch, then lit_rl and what it needs, into .venv: about 2 GB, two minutes or more"
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: venv  ## train PPO on CartPole-v1, play 100 episodes with its last checkpoint, draw its learning curve
	$(BIN)/lit-rl fit --config recipes/ppo_cartpole.yaml $(ARGS)
	$(BIN)/lit-rl validate --config recipes/ppo_cartpole.yaml --ckpt_path last --data.evaluation.episodes 100
	@newest=$$(ls -t runs/ppo_cartpole/version_*/checkpoints/*.ckpt | head -n 1); \
	  run=$${newest%/checkpoints/*}; \
	  $(BIN)/lit-rl plot $$run --metric rollout/return_mean --metric eval/return_mean -o $$run/curve.png >/dev/null \
	    && echo "Checkpoint: $$newest, curve: $$run/curve.png, log: $$run/metrics.csv"

test: venv  ## run the tests, 19 minutes on two idle cores (ARGS="-m 'not slow'" for the quick ones, 4 minutes)
	@echo "make test: about 19 minutes on two idle cores; about 4 with ARGS=\"-m 'not slow'\""
	$(BIN)/pytest -n 2 --dist worksteal --durations=30 $(ARGS)

chaos: venv  ## the long form of the tests that kill and break things: half an hour (ARGS="--chaos-seed 1")
	$(BIN)/pytest -m chaos --long -rP $(ARGS)

lint: venv  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: venv  ## check types
	$(BIN)/mypy

check: lint types test  ## all that must pass before a change is proposed

docs: venv  ## write the tables of options in docs anew, from signatures and docstrings
	$(BIN)/python docs/make_tables.py

results: venv  ## train and judge recipes over seeds: docs/results (RECIPE=ppo_cartpole SEEDS="1 2 3 4 5"; without RECIPE all)
	for recipe in $(RECIPE); do $(BIN)/python benchmarks/results.py $$recipe --seeds $(SEEDS) || exit 1; done

clean:  ## remove caches and build products; .venv and runs stay
	rm -rf build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
