# Every target creates .venv if it is missing, and can be run again. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo reviews test faults consistency matrix fuzz certify certify-versions bench bench-op bench-step gpu-first roofline lint format \
	typecheck docs docs-serve dist smoke clean

help:
	@echo "make demo        align a real 135M model on real text, with a report in runs/demo/report.md"
	@echo "make reviews     run the whole pipeline on real reviews, four losses: runs/reviews/evaluation/report.md"
	@echo "make test        run all tests"
	@echo "make faults      kill and damage trainings, and check that nothing is lost (docs/reliability.md)"
	@echo "make consistency compare a training on 1, 2 and 4 processes and every ZeRO stage (docs/reliability.md)"
	@echo "make fuzz        test 30,000 hostile inputs"
	@echo "make matrix      test in environments with other versions: docs/compatibility.md"
	@echo "make certify     compile every kernel for six GPU targets, no GPU needed, and check the machine code"
	@echo "make certify-versions  the same with Triton 3.6 and 3.8 too, each in a folder of its own"
	@echo "make bench       run all benchmarks, 40 minutes: results in benchmarks/results, tables in docs/performance.md"
	@echo "make gpu-first   test, time and tune on a GPU in ten minutes: runs/gpu-first, docs/gpu.md (PYTHON=..., no .venv)"
	@echo "make roofline    predict the GPU kernels' times by their flops and bytes, no GPU needed (docs/gpu-analysis.md)"
	@echo "make lint        check by ruff, and the layers of imports;  make format rewrites"
	@echo "make typecheck   run mypy on the public library"
	@echo "make docs        build the documentation site in build/site;  make docs-serve shows it while you write"
	@echo "make dist        build the wheel and the source archive in dist"
	@echo "make smoke       install both in an empty environment, and run them there"
	@echo "make clean       remove .venv and everything built"

# The environment depends only on these two files. An interrupted install starts again from an empty environment.
$(VENV)/.ready: setup.py constraints.txt
	test ! -e $(VENV)/.installing || $(PYTHON) -m venv --clear $(VENV)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $(VENV)/.installing
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar off -c constraints.txt -e ".[dev,bench]"
	mv $(VENV)/.installing $@

demo: $(VENV)/.ready
	$(BIN)/exo-fast demo

reviews: $(VENV)/.ready
	$(BIN)/exo-fast run recipes/reviews.yaml

test: $(VENV)/.ready
	$(BIN)/pytest -n 2 --dist worksteal

faults: $(VENV)/.ready
	$(BIN)/pytest -m long
	$(BIN)/python -m exo_fast.benchmarks.reliability.faults --markdown docs/reliability.md

# 800 cases of each property make 30,000 and more in all, new ones every time.
CASES ?= 800
fuzz: $(VENV)/.ready
	EXO_FAST_FUZZ=$(CASES) $(BIN)/pytest tests/fuzz -n 2 --dist worksteal

consistency: $(VENV)/.ready
	$(BIN)/python -m exo_fast.benchmarks.reliability.consistency --markdown docs/reliability.md

# Five environments need torch with CUDA, 5 GB each. One alone: make matrix ONLY="--only pinned". Interrupted: ONLY=--continue
matrix: $(VENV)/.ready
	$(BIN)/python -m exo_fast.benchmarks.reliability.matrix --markdown docs/compatibility.md $(ONLY)

CERTIFY := env -u TRITON_INTERPRET $(BIN)/python -m exo_fast.kernels.certification --markdown docs/certification.md
certify: $(VENV)/.ready
	$(CERTIFY)

# The Tritons of torch 2.11 and 2.14, each in a folder of its own that hides the one of the environment.
TRITONS := 3.6.0 3.8.0
certify-versions: certify $(TRITONS:%=build/triton-%/.ready)
	failed=0; for version in $(TRITONS); do \
		PYTHONPATH=build/triton-$$version $(CERTIFY) --output build/certification-$$version.json || failed=1; \
	done; exit $$failed

build/triton-%/.ready: $(VENV)/.ready
	rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar off --no-deps --target $(@D) triton==$*
	touch $@

# One suite alone: make bench-op. To run what was interrupted or did not fit in the time: make bench CONTINUE=--continue
# A machine half as fast as ours does not reach the last cases; MINUTES=600 waits for all.
MINUTES ?= 40
bench: $(VENV)/.ready
	$(BIN)/exo-fast bench all --minutes $(MINUTES) --output_dir benchmarks/results $(CONTINUE); status=$$?; \
	$(BIN)/python -m exo_fast.benchmarks.report.page && exit $$status

bench-op bench-step: bench-%: $(VENV)/.ready
	$(BIN)/exo-fast bench $* --output_dir benchmarks/results $(CONTINUE)

# For a machine without a network: the python at hand, this tree as it is, nothing installed. Without a GPU a dry run.
GPU_OUT ?= runs/gpu-first
gpu-first:
	if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
	  PYTHONPATH=$(CURDIR) $(PYTHON) -m exo_fast.training.cli gpu --minutes 10 --output_dir $(GPU_OUT) \
	    --markdown docs/gpu.md; \
	else \
	  PYTHONPATH=$(CURDIR) $(PYTHON) -m exo_fast.training.cli gpu --minutes 10 --output_dir $(GPU_OUT) --dry-run; \
	fi

roofline: $(VENV)/.ready
	$(BIN)/python -m exo_fast.benchmarks.roofline.predict
	$(BIN)/python -m exo_fast.benchmarks.roofline.tables --markdown docs/gpu-analysis.md docs/performance.md

# The layers of imports are checked on the installed tree, which has the folders beside exo_fast/ inside it.
LAYERS := build/layers
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(LAYERS) && $(BIN)/python setup.py -q build_py -d $(LAYERS) 2> /dev/null
	touch $(LAYERS)/exo_fast/kernels/__init__.py
	cd $(LAYERS) && $(abspath $(BIN))/lint-imports $(CURDIR)/pyproject.toml --no-cache --no-logo

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.ready
	$(BIN)/mypy

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

dist: $(VENV)/.ready
	rm -rf dist && mkdir -p build
	$(BIN)/python -m build --outdir dist > build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	@ls dist

smoke: dist
	$(BIN)/python tests/packaging/smoke.py dist

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
