# `make help` lists the targets. Two commands to begin with: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help install demo serve chat test slow lint parity bench train clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml $(addprefix requirements/,cpu.txt gateway.txt train.txt dev.txt openai-2.txt suites.txt install.sh)
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@requirements/install.sh $(VENV)
	@touch $@

install: $(INSTALLED)  ## create .venv with the CPU stack at pinned versions

demo: $(INSTALLED)  ## serve the shipped model, ask it three questions, stop
	@$(BIN)/python -m clients.demo

serve: $(INSTALLED)  ## serve the shipped model on 127.0.0.1:8000 until Ctrl-C
	@$(BIN)/medassist serve

chat: $(INSTALLED)  ## talk to the server that `make serve` started
	@$(BIN)/medassist chat

lint: $(INSTALLED)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint  ## lint, types, unit tests, and end-to-end tests against a real engine
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not engine" -n 2 --dist loadfile
	@$(BIN)/python -m pytest -m "not slow and engine" -n 2 --dist loadfile

slow: lint  ## the tests that `make test` leaves out, one after the other (hours)
	@$(BIN)/python -m pytest -m slow

parity: $(INSTALLED)  ## served against trained log-probabilities, the whole matrix; ARCH=gpt: one architecture
	@MEDASSIST_ARCH=$(if $(filter command line,$(origin ARCH)),$(ARCH)) $(BIN)/python -m pytest tests/parity -m "slow or not slow"

bench: $(INSTALLED)  ## what the gateway costs, then each architecture beside vLLM's Llama (over an hour)
	@$(BIN)/python -m loadtest.benchmark --report docs/benchmarks/gateway-throughput.md
	@$(BIN)/python -m loadtest.gateway.cost --memory 100000 --report docs/benchmarks/gateway-cost.md
	@$(BIN)/python -m loadtest.gateway.overload --report docs/benchmarks/gateway-overload.md
	@$(BIN)/python -m loadtest.gateway.hostile --report docs/benchmarks/gateway-hostile.md
	@$(BIN)/python -m loadtest.gateway.fairness --report docs/benchmarks/gateway-fairness.md
	@$(BIN)/python -m loadtest.gateway.limits --report docs/benchmarks/gateway-limits.md
	@$(BIN)/python -m loadtest.gateway.ledger --report docs/benchmarks/gateway-ledger.md
	@$(BIN)/medassist bench engine --profile below --report docs/benchmarks/engine.md

train: $(INSTALLED)  ## train the shipped checkpoint again, into runs/demo (two cores: under 30 minutes)
	@$(BIN)/medassist train --recipe demo --out runs/demo

clean:  ## remove what the tools left behind (not .venv)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
