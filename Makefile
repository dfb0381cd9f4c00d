# Everything runs in .venv, which scripts/make_env.sh fills once and again only when the dependencies change.
PYTHON ?= python3
PROFILE ?= laptop
READY := .venv/.homelib-ready
STARTED := $(shell date +%s)

# Without compiled bytecode every process spends 19 s on importing MONAI.
unexport PYTHONDONTWRITEBYTECODE

# A thread that waits for work spins a little and then sleeps. Seconds a training step on two cores, alone and beside one busy program:
# spin count 300 0.75 and 1.0, 3000 0.59 and 1.1, 30000 0.50 and 1.9. 10000 lies between (alone 0.66, once; beside another not measured).
export GOMP_SPINCOUNT ?= 10000

# A .venv that was copied or moved here still points at its old folder: fill it anew.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

# $(call timed,COMMAND): run it, say how long all of it took, installing included, and pass its exit status on.
timed = @$(1); status=$$?; seconds=$$(( $$(date +%s) - $(STARTED) )); \
	echo "make $@: exit status $$status after $$((seconds / 60)) min $$((seconds % 60)) s in all"; exit $$status

.PHONY: help env demo test lint coverage mutants lab bench bench-data bench-evaluation bench-gpu wheels-gpu weights site gallery clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(READY) ## install homelib and all it needs into .venv (PYTHON=python3.12 picks the interpreter)
	@echo "make env: .venv is up to date; 'source .venv/bin/activate' puts it on your path"

$(READY): pyproject.toml constraints-cpu.txt
	@PYTHON='$(PYTHON)' bash scripts/make_env.sh

demo: $(READY) ## run the demo: train, predict, evaluate and look inside a small network (PROFILE=laptop)
	@echo "make demo: the workbook's demo, profile $(PROFILE); results go to runs/demo"
	$(call timed,.venv/bin/home demo --profile $(PROFILE))

test: $(READY) ## run the tests, side by side on all cores (ARGS='-k scan' picks some of them, ARGS='-n 0 --pdb' one after the other)
	@echo "make test: the tests; those that need what this machine lacks are skipped and say why"
	$(call timed,.venv/bin/python -m pytest -n auto --dist worksteal $(ARGS))

lint: $(READY) ## ruff, the types by mypy, and what docstrings say of shapes, units and errors
	$(call timed,.venv/bin/ruff check . && .venv/bin/mypy && .venv/bin/python scripts/docstrings.py)

coverage: $(READY) ## the tests, and which lines of homelib they run; fails below 90 % (ARGS='-k scan' as of make test; pages in build/coverage)
	@rm -rf build/coverage
	$(call timed,(.venv/bin/python -m coverage run -m pytest -n auto --dist worksteal $(ARGS); tests=$$?; .venv/bin/python -m coverage combine --quiet \
		&& .venv/bin/python -m coverage html --quiet --directory build/coverage/pages && .venv/bin/python -m coverage report && exit $$tests))

mutants: $(READY) ## would the tests notice? 50 small faults, one at a time, into benchmarks/results/mutants.json (ARGS='--seeds 1 2')
	$(call timed,.venv/bin/python scripts/mutants.py $(ARGS))

bench: $(READY) ## measure speed and memory on this CPU beside the peers, into benchmarks/results/cpu.json
	@bash scripts/make_peers.sh
	$(call timed,PYTHONPATH=.venv/peers .venv/bin/python -m benchmarks.cpu)

bench-data: $(READY) ## measure preparing scans and reading patches beside plain scripts, into benchmarks/results/data.json
	$(call timed,.venv/bin/python -m benchmarks.data)

bench-evaluation: $(READY) ## measure HD95 beside MONAI's and the prediction of a large scan, into benchmarks/results/evaluation.json
	$(call timed,.venv/bin/python -m benchmarks.evaluation)

bench-gpu: ## speed and memory on a GPU, into benchmarks/results/gpu.json (PYTHON=python3 picks an environment with torch and triton; installs nothing)
	$(call timed,PYTHONPATH=.:$$PYTHONPATH $(if $(wildcard $(READY)),.venv/bin/python,$(PYTHON)) -m benchmarks.gpu)

wheels-gpu: $(READY) ## collect wheels of pure Python into build/wheels, to be carried with the clone to a GPU without a network, for bench-gpu
	@bash scripts/make_wheels.sh

weights: $(READY) ## after make demo: its trained network in 6 bits, with a card, into homelib/weights/demo, which notebook 00 shows
	$(call timed,.venv/bin/python scripts/weights.py)

site: $(READY) ## the executed notebooks of make demo and the docs as web pages with search, into build/site
	$(call timed,.venv/bin/python scripts/site.py)

gallery: demo ## make demo, and from it the small pictures of the README's map, into docs/gallery
	@.venv/bin/python scripts/gallery.py

lab: $(READY) ## open the notebooks in JupyterLab
	@HOMELIB_RUNS="$${HOMELIB_RUNS:-$(CURDIR)/runs}" .venv/bin/jupyter lab --notebook-dir=notebooks

clean: ## remove .venv, caches and runs/demo; your own run folders stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis runs/demo
	@find . \( -path ./.git -o -path ./runs \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
	@echo "make clean: removed .venv, caches and runs/demo; kept every other folder below runs/"
