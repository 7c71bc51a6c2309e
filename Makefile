# Two commands do everything on a fresh machine: `make demo` and `make test`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WITH_BROKER := $(PYTHON) -m integration.nodes run
EXTRAS_STAMP := $(VENV)/.amqtask-all
DEV_STAMP := $(VENV)/.amqtask-dev

.PHONY: help demo test unit integration check lint format bench soak flow faults redrive cluster fuzz docs release clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(EXTRAS_STAMP)  ## Run the main job on a real RabbitMQ (BROKER=redis: on Redis): worker -Q cma_queue -P eventlet -c 5
	@$(WITH_BROKER) --broker $(or $(BROKER),rabbitmq) -- $(BIN)/python -m examples.demo

test: check  ## Checks, unit tests, integration tests, coverage
	@$(BIN)/python -m integration.run

unit: $(DEV_STAMP)  ## Unit tests only: no broker; about four minutes on two cores
	@$(BIN)/python -m pytest tests -q

integration: $(DEV_STAMP)  ## Integration tests only
	@$(BIN)/python -m integration.run integration

check: $(DEV_STAMP)  ## ruff, mypy --strict, pyright, import-linter, known vulnerabilities, the public API, the site's links
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports --config setup.cfg
	@$(BIN)/python -m integration.upkeep
	@$(BIN)/python docs/make_site.py

lint: check  ## The same as check

format: $(DEV_STAMP)  ## Let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(DEV_STAMP)  ## Ours beside bare pika, Celery, Dramatiq and Taskiq, in one run
	@$(WITH_BROKER) --redis -- $(BIN)/python -m benchmarks

soak: $(DEV_STAMP)  ## Nothing lost: 2,000 tasks under each fault (SOAK_ARGS="--root DIR" for another RabbitMQ)
	@$(BIN)/python -m integration.soak $(SOAK_ARGS)

flow: $(DEV_STAMP)  ## Limits, unique tasks and the inbox hold in a million calls while workers are killed (FLOW_ARGS="--calls 100000")
	@$(WITH_BROKER) --redis -- $(BIN)/python -m integration.flow_soak $(FLOW_ARGS)

cluster: $(DEV_STAMP)  ## Nothing lost on three nodes that fail (VERSIONS="3.10 4.0 4.3", CLUSTER_ARGS="--scenario NAME")
	@$(BIN)/python -m integration.cluster $(if $(VERSIONS),--versions $(VERSIONS)) $(CLUSTER_ARGS)

redrive: $(DEV_STAMP)  ## 10,000 dead letters back to work while console, worker and broker are killed (REDRIVE_ARGS="--rate 500")
	@$(BIN)/python -m integration.redrive $(REDRIVE_ARGS)

faults: $(DEV_STAMP)  ## 2,000 numbered tasks on Redis while it, its clients and the workers are hurt
	@$(BIN)/python -m integration.redis_faults $(FAULTS_ARGS)

fuzz: $(DEV_STAMP)  ## 10,000 hostile messages to a live worker on each pool (FUZZ_ARGS="--seed 2 prefork")
	@$(BIN)/python -m integration.fuzz $(FUZZ_ARGS)

docs: $(DEV_STAMP)  ## Write docs/settings.md, build the site into build/site
	@$(BIN)/python docs/make_settings.py
	@$(BIN)/python docs/make_site.py
	@$(BIN)/python -m pytest tests/test_docs.py -q

release: $(DEV_STAMP)  ## All of a release but the upload, into dist: built twice, tried on each Python, listed
	@$(BIN)/python -m integration.release

clean:  ## Remove the virtual environments, caches and build results
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "amqtask needs Python 3.10 or newer")'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  echo "python3-venv is missing; installing it …"; \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y python3-venv >/dev/null; } || { \
	    echo "Install Python's venv module (Debian: apt-get install python3-venv) and run this again."; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }

$(EXTRAS_STAMP): $(BIN)/python pyproject.toml
	@echo "installing amqtask into $(VENV) …"
	@$(BIN)/pip -q --disable-pip-version-check install -e '.[all]'
	@touch $@

$(DEV_STAMP): $(BIN)/python pyproject.toml
	@echo "installing amqtask and its development tools into $(VENV) …"
	@$(BIN)/pip -q --disable-pip-version-check install -e '.[dev]'
	@touch $@ $(EXTRAS_STAMP)
