# One door for a person and for CI. `make` or `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run demo unit test faults fairness soak watchers bench ab count check format lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: .venv/ready  ## Start the local stack, send the sample flow through it, stay up until Ctrl-C
	@$(BIN)/python -m worker.cli demo --stay || [ $$? -eq 130 ]

demo: .venv/ready  ## The same, but end with exit code 0 if all is as expected
	@$(BIN)/python -m worker.cli demo --port 0

# Without the plugin of hypothesis, which takes a second to load and has nothing that is used here.
unit: .venv/ready  ## Run the tests that need no server, in less than 10 seconds
	$(BIN)/python -m pytest tests/unit -p no:hypothesispytest

test: .venv/ready  ## Run all tests, in two processes with a stack each, then `make check`
	$(BIN)/python -m pytest -n 2 --dist worksteal
	@$(MAKE) --no-print-directory check

faults: .venv/ready  ## Break everything at random, compare with a model; SECONDS=600 SEED= PLANT=
	$(BIN)/python -m tests.faults --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED)) \
		$(if $(PLANT),--plant $(PLANT))

fairness: .venv/ready  ## Measure how long one organization waits while another has 50,000 batches
	$(BIN)/python -m tests.load.fairness

soak: .venv/ready  ## Run BATCHES=1000000 through one worker; its memory must not grow
	$(BIN)/python -m tests.load.soak --batches $(or $(BATCHES),1000000)

watchers: .venv/ready  ## Measure CLIENTS=1000 WebSockets on one endpoint; nothing may stay behind when they leave
	$(BIN)/python -m tests.load.watchers --clients $(or $(CLIENTS),1000)

bench: .venv/bench  ## Compare with other queues and the limits of this machine; writes docs/bench.md; SMOKE=1
	$(BIN)/python -m tests.bench $(if $(SMOKE),--smoke)

ab: .venv/ready  ## Compare the speed of HEAD with that of BASE=<commit>; BAR=0.95 is what passes; FULL=1
	@$(BIN)/python -m tests.bench.ab --base $(or $(BASE),$(error BASE=<commit> is missing)) \
		--bar $(or $(BAR),0.95) $(if $(FULL),--full)

count: .venv/ready  ## Count the product's code lines by package; BASE=<commit> to compare with
	@$(BIN)/python -m tests.bench.count $(if $(BASE),--base $(BASE))

check: .venv/ready  ## Linter, formatter, type checker, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: .venv/ready  ## Choose versions anew and write requirements.lock
	$(BIN)/uv pip compile pyproject.toml $(COMPILE) --upgrade -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml $(COMPILE) --extra bench -c requirements.lock -o requirements-bench.lock

COMPILE := --universal --python-version 3.11 --extra worker --extra embedded --extra dev --generate-hashes \
	--no-header --no-annotate --quiet

clean:  ## Remove what make and the local stack have made
	rm -rf .venv .task-tags build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is required: make PYTHON=...")'
	@echo "installing into .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch .venv/ready

# All that is needed is in the lock, so nothing is resolved: arq's own bound on redis would not let it.
.venv/bench: .venv/ready requirements-bench.lock
	@echo "installing what is compared"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-bench.lock
	@touch .venv/bench
