# One door for a person and for CI. `make` or `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin

# Compiled modules are kept: without them each of the stack's processes takes seconds more to start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run demo unit test faults mutants prove fairness soak decisions followers watchers
.PHONY: waiters bench ab count docs check format lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Ctrl-C reaches the shell as well: it must wait for the stack to end.
run: .venv/run  ## Start the local stack, send the sample flow, stay up until Ctrl-C; PORT=8080
	@trap : INT; $(BIN)/python -m worker demo --stay --port $(or $(PORT),8080) || \
		{ code=$$?; [ $$code -eq 130 ] || exit $$code; }

demo: .venv/run  ## The same, but end with exit code 0 if all is as expected
	@$(BIN)/python -m worker demo --port 0

# Without the plugin of hypothesis, which takes a second to load and has nothing that is used here.
unit: .venv/ready  ## Run the tests that need no server, in less than 10 seconds
	$(BIN)/python -m pytest tests/unit -p no:hypothesispytest

test: .venv/ready  ## Run all tests, in three processes with a stack each, then `make check`
	$(BIN)/python -m pytest -n 3 --dist worksteal
	@$(MAKE) --no-print-directory check

faults: .venv/ready  ## Break things at random, compare with a model; SECONDS=600 SEED= PLANT= ONLY=
	$(BIN)/python -m tests.faults --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED)) \
		$(if $(PLANT),--plant $(PLANT)) $(if $(ONLY),--only '$(ONLY)')

mutants: .venv/ready  ## Plant mistakes in a copy, one by one; a test must fail for each; ONLY=word
	$(BIN)/python -m tests.mutants $(ONLY)

prove: .venv/ready  ## Run the long proofs one after the other, half an hour; SECONDS=600 SEED=
	$(BIN)/python -m tests.prove --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

fairness: .venv/ready  ## Measure how long one organization waits while another has 50,000 batches
	$(BIN)/python -m tests.load.fairness

soak: .venv/ready  ## Run BATCHES=1000000 through one worker; its memory must not grow
	$(BIN)/python -m tests.load.soak --batches $(or $(BATCHES),1000000)

decisions: .venv/ready  ## Claim tasks by many clients while workers are killed; CLAIMS=100000 SEED=
	$(BIN)/python -m tests.load.decisions --claims $(or $(CLAIMS),100000) $(if $(SEED),--seed $(SEED))

followers: .venv/ready  ## Follow work lists while they change, compare; CHANGES=100000 CLIENTS=50
	$(BIN)/python -m tests.load.followers --changes $(or $(CHANGES),100000) \
		--clients $(or $(CLIENTS),50) $(if $(SEED),--seed $(SEED))

watchers: .venv/ready  ## Measure CLIENTS=1000 WebSockets on one endpoint, and what they leave
	$(BIN)/python -m tests.load.watchers --clients $(or $(CLIENTS),1000)

waiters: .venv/ready  ## Measure WAITERS=10000 waits on one endpoint; RESTARTS=5 kills servers
	$(BIN)/python -m tests.load.waiters --waiters $(or $(WAITERS),10000) \
		--restarts $(or $(RESTARTS),0)

bench: .venv/bench  ## Compare with other queues and limits; SMOKE=1; FULL=1 writes docs/bench.md
	$(BIN)/python -m tests.bench $(if $(SMOKE),--smoke) $(if $(FULL),--full)

ab: .venv/ready  ## Compare the speed of HEAD with BASE=<commit>; BAR=0.95 is what passes; FULL=1
	@$(BIN)/python -m tests.bench.ab --base $(or $(BASE),$(error BASE=<commit> is missing)) \
		--bar $(or $(BAR),0.95) $(if $(FULL),--full)

count: .venv/ready  ## Count the product's code lines by package; BASE=<commit> to compare with
	@$(BIN)/python -m tests.bench.count $(if $(BASE),--base $(BASE))

docs: .venv/docs  ## Write docs/reference.md from the code, and build the site in build/docs
	$(BIN)/python -m tools.reference
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

check: .venv/ready  ## Linter, formatter, type checker, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: .venv/ready  ## Choose new versions and write the lock files
	$(COMPILE) --extra dev --upgrade -o requirements.lock
	$(COMPILE) -c requirements.lock -o requirements-run.lock
	$(COMPILE) --extra dev --extra bench -c requirements.lock -o requirements-bench.lock
	$(COMPILE) --extra dev --extra docs -c requirements.lock -o requirements-docs.lock

COMPILE := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --group build \
	--extra worker --extra embedded --generate-hashes --no-header --no-annotate --quiet

define CHECK_LOCK
import fcntl, sys
lock = open(".task-tags/lock")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("a stack is running on .task-tags; to stop it: kill " + lock.read().partition(" ")[0])
endef
export CHECK_LOCK

# The data name their state directory (worker/local/servers.py): this one may be a copy of it.
define REMOVE_DATA
data=$$(readlink build/.task-tags/servers)
{ IFS= read -r owner && read -r identity; } 2> /dev/null < "$$data/state-directory" || exit 0
case "$$data" in /var/lib/task-tags/*)
	is_there=$$(readlink "$$owner/servers")$$(stat -c %d:%i "$$owner" 2> /dev/null)
	if test "$$identity" = "$$(stat -c %d:%i build/.task-tags)" &&
		test "$$is_there" != "$$data$$identity"; then
		rm -rf "$$data"
	else
		echo "not deleted, for it may be another directory's: $$data"
	fi
esac
endef
export REMOVE_DATA

# Directories are moved before they are deleted: an interrupted `make clean` leaves no half of one.
clean:  ## Remove what make and the local stack have made
	@! test -e .task-tags/lock || $(PYTHON) -c "$$CHECK_LOCK"
	rm -rf build && mkdir build
	mv .venv .task-tags build 2> /dev/null || true
	@test ! -L build/.task-tags/servers || eval "$$REMOVE_DATA"
	rm -rf .venv .task-tags build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# What running needs comes first. The rest (linters, type checker, browser driver and the like) is
# installed when a goal needs it.
.venv/run: requirements-run.lock pyproject.toml tools/install.sh
	@echo "installing what running needs into .venv (200 MB)"
	@PYTHON="$(PYTHON)" sh tools/install.sh requirements-run.lock
	@touch .venv/run

.venv/ready: .venv/run requirements.lock
	@echo "installing what tests and checks need into .venv (300 MB)"
	@PYTHON="$(PYTHON)" sh tools/install.sh requirements.lock
	@touch .venv/ready

# All is in the lock, so nothing is resolved: arq's own bound on redis would not let it.
.venv/bench: .venv/ready requirements-bench.lock
	@echo "installing what is compared"
	@PYTHON="$(PYTHON)" sh tools/install.sh requirements-bench.lock
	@touch .venv/bench

.venv/docs: .venv/ready requirements-docs.lock
	@echo "installing what builds the site"
	@PYTHON="$(PYTHON)" sh tools/install.sh requirements-docs.lock
	@touch .venv/docs
