# Two commands matter to a user: `make run` and `make test`. `make help` lists all.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
.PHONY: help env run test lint pool bench results-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

env: $(STAMP)  ## make .venv with everything that development needs

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

run: env  ## the main job: shipped pool -> few-shot learner -> runs/main/report.html
	$(BIN)/metapool run

lint: env  ## ruff, mypy --strict, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## lint, types, tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2

bench: env  ## time each unit against its plain reference -> benchmarks/results/units.json (about three minutes)
	$(BIN)/python benchmarks/units.py

results-check: env  ## recompute a row of every committed table and compare (about a quarter of an hour)
	$(BIN)/python tools/check_results.py

pool: env  ## rebuild the shipped pool (maintainers; about seven minutes on 2 cores)
	rm -rf src/metapool/shipped/icons-30
	$(BIN)/metapool pool build --data icons --models 30 --architectures conv4:32 resnet10:12 resnet18:12 --seed 0 --licence Apache-2.0 --out src/metapool/shipped/icons-30

clean:  ## remove what was built, keep runs/
	rm -rf .venv build dist store
