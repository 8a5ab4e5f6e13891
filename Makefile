# Every command of the project. Each sets up what it still needs in .venv, and nothing twice.

PYTHON ?= python3
DEVICE ?= auto
MAKEFLAGS += --no-print-directory
SET_UP := $(PYTHON) deploy/install.py --quiet --device $(DEVICE)
BIN := .venv/bin
# HOST counts only on the command line: some shells and toolchains export a HOST that is no address.
HOST_GIVEN := $(if $(findstring command line,$(origin HOST)),$(HOST))
# Images and shells often forbid byte code. Without it every process compiles all that it imports: of vLLM, 6 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve test check audit fix bench finetune clean lock

help:
	@echo "Refrain: serve a model behind the OpenAI API, and compute no answer twice."
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS=@ read -r target words; do printf '%-16s %s\n' "$$target" "$$words"; done

serve: ## set up and serve on 127.0.0.1:8000; PORT=, HOST= and MODEL= override
	@$(SET_UP) --for serve
	@exec $(BIN)/refrain serve \
		$(if $(HOST_GIVEN),--host "$(HOST_GIVEN)") $(if $(PORT),--port "$(PORT)") $(if $(MODEL),--model "$(MODEL)")

# One of the two processes has the tests of the real engine. A third finds no processor left on two cores (benchmarks/LOG.md).
test: ## set up and run the whole suite; ARGS="-k cache" narrows it
	@$(SET_UP) --for test
	@exec $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: ## formatting, lint, types, import map, YAML, Dockerfile; changes nothing
	@$(SET_UP) --for test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict deploy/install.py deploy/lock/compile.py
	$(BIN)/yamllint --strict .
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_import_map.py

fix: ## format and repair what ruff can
	@$(SET_UP) --for test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m app.settings_table README.md

audit: ## look for known vulnerabilities of the locked dependencies; asks PyPI about each
	@$(SET_UP) --for test
	$(BIN)/python -m pip_audit --disable-pip --no-deps $(foreach lock,cpu gpu train dev,-r deploy/lock/$(lock).txt) $(ARGS)

bench: ## measure hits, misses and peers on this machine; ARGS= goes to the benchmarks
	@$(SET_UP) --for test
	@exec $(BIN)/python -m benchmarks $(ARGS)

finetune: ## train, evaluate, publish, serve and ask the example support bot; CONFIG=job.toml runs a job of yours
	@$(SET_UP) --for finetune
	@exec $(BIN)/$(if $(CONFIG),refrain finetune run "$(CONFIG)",python examples/support-bot/run.py) $(ARGS)

clean: ## remove .venv, caches and build output; weights and keys stay
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis build dist *.egg-info
	find app tests benchmarks deploy -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

lock: ## resolve the dependencies anew into deploy/lock; UPGRADE=1 takes newer releases
	@$(SET_UP) --for lock
	$(BIN)/python deploy/lock/compile.py $(if $(UPGRADE),--upgrade)
