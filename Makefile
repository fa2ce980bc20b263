# Every target makes .venv first when it needs one. Another interpreter: make install PYTHON=python3.12
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
ARGS ?=
BENCH ?= ect deq
NUMERICS := $(addprefix tests/common/,deq diffusion ham losses metrics nets optim)

EXPERIMENTS := $(sort $(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/*.yaml)))
CLAIMS := $(sort $(patsubst conf/claim/%.yaml,%,$(wildcard conf/claim/*.yaml)))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-emulated lint type check claims zoo gallery doctor bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z%<>-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  published experiments (ARGS='key=value ...' is passed on):"
	@for name in $(EXPERIMENTS); do printf '    make repro-%s\n' $$name; done
	@echo "  small claims:"
	@for name in $(CLAIMS); do printf '    make claim-%s\n' $$name; done

install: $(STAMP) ## .venv with everything from pyproject.toml

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) not found. Install Python 3.11 or newer, or name it: make install PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Name another: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module. Install it (Debian, Ubuntu: apt install python3-venv) and run make again"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: install ## install, then train a teacher and tune it into a one-step generator on real digits (2 cores, 8 minutes)
	$(PY) -m projects.run +experiment=ect_tiny $(ARGS)

test: install lint type ## install, then lint, types and all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not net" --durations=20 $(ARGS)
	@test -n "$(ARGS)" || $(MAKE) --no-print-directory test-emulated

# Compilers and tensors without values give nothing else on another processor.
test-emulated: install ## the numerical tests once more, with AVX2 as on processors without AVX-512
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "not net and not slow" \
	  -k "not compil and not fake and not shapes_alone and not machine_code and not interpreter and not processes" $(NUMERICS)

lint: install ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .

type: install ## mypy over the packages that pyproject.toml names; every other file compiles
	$(PY) -m mypy
	$(PY) -m compileall -q common projects tools tests

check: install ## compose, check and fake-run every experiment at its published depth
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --full tests/test_experiments.py $(ARGS)

doctor: install ## what works on this machine, and why not
	$(PY) -m tools.doctor $(ARGS)

bench: install ## times against the published procedures; one alone: BENCH=deq
	@set -e; for name in $(BENCH); do $(PY) -m tools.bench $$name $(ARGS); done

claims: install ## every small claim: runs, verdicts, records
	$(PY) -m tools.claim --all $(ARGS)

claim-%: install ## one small claim, for instance claim-ect
	$(PY) -m tools.claim $* $(ARGS)

repro-%: ## one published experiment, for instance repro-ect_cifar10
	@test -f conf/experiment/$*.yaml || { \
	  echo "error: conf/experiment/$*.yaml does not exist. List the experiments with: make help"; exit 2; }
	@$(MAKE) --no-print-directory install
	$(PY) -m projects.run +experiment=$* $(ARGS)

zoo: install ## render the tables in README.md, projects/README.md and the cards
	$(PY) -m tools.zoo

gallery: install ## one page of pictures, curves and claims, outputs/gallery/index.html
	$(PY) -m tools.gallery $(ARGS)

clean: ## remove caches of Python and the tests; runs and weights stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find common projects tools tests -name __pycache__ -type d -exec rm -rf {} +
