# TuneServe: every task a developer or a curious user needs. `make` lists them.
SHELL := /bin/bash -eu -o pipefail
.DEFAULT_GOAL := help
export TUNESERVE_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tuneserve
TOOLS := $(TUNESERVE_CACHE)/tools/bin
export PATH := $(CURDIR)/.venv/bin:$(TOOLS):$(PATH)
export UV_PYTHON ?= 3.11
PYTEST := pytest
STAMP := .venv/.synced

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(TOOLS)/uv: scripts/bootstrap
	@scripts/bootstrap >/dev/null

$(STAMP): uv.lock pyproject.toml | $(TOOLS)/uv
	@echo "Python environment with torch (about 1 min; 5 GB, most of it shared with uv's cache)"
	@uv sync --quiet --frozen --no-install-project --extra pipeline --extra dev --compile-bytecode
	@touch $@

.PHONY: env
env: $(STAMP) ## Install uv, Go where it is missing, and the Python environment

.PHONY: demo
demo: env ## Train, evaluate and serve a real model on a real cluster, from nothing
	@python demo/demo.py

.PHONY: test
test: env lint ## Run all tests; builds and starts what they need
	@cluster/cluster build
	@$(PYTEST) tests -n 2 --dist loadgroup --no-loadscope-reorder --durations=15

.PHONY: lint
lint: env ## ruff, mypy, import-linter, and that generated files are fresh
	@ruff check . && ruff format --check .
	@mypy
	@PYTHONPATH=operator:pipeline lint-imports
	@PYTHONPATH=operator:pipeline python -m tuneserve.api.schema --check

.PHONY: crds
crds: env ## Generate crds/ (and the chart's copy) from the pydantic models
	@PYTHONPATH=operator:pipeline python -m tuneserve.api.schema

.PHONY: images
images: env ## Build the container images and load them into the cluster
	@images/build all
	@cluster/cluster load-image $(TUNESERVE_CACHE)/images/oci

.PHONY: cluster
cluster: $(TOOLS)/uv ## Build and start the one-node Kubernetes
	@cluster/cluster build && cluster/cluster up

.PHONY: clean
clean: ## Remove every trace: clusters, mounts, namespaces, interfaces, built images
	@cluster/cluster down --all --purge
	@rm -rf $(TUNESERVE_CACHE)/images $(TUNESERVE_CACHE)/demo .venv .mypy_cache .ruff_cache .pytest_cache
