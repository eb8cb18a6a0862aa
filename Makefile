# Two commands: `make demo` and `make test`. Both build .venv themselves; all they need is Python 3.11 or newer.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SUPPORTED := import sys, venv; sys.exit(sys.version_info < (3, 11))
# the first interpreter that is new enough and really starts
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# hundreds of processes start in a test run: each would compile all that it imports
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast check proof chaos soak bench bench-peers bench-report fuzz clean distclean venv
.DEFAULT_GOAL := demo

demo: venv  ## a federated model, trained on real digits through the whole pipeline
	$(BIN)/python examples/digits/job.py --workspace workspace

test: venv  ## everything, processes and kill -9 included, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

test-fast: venv  ## the tiers that start no processes, on two cores: under a minute
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not process and not gpu and not proof"

check: venv  ## lint, format, types, and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

proof: venv  ## the long forms: 20,000 schedules, each safeguard switched off in turn, machines, bounds (hours on two cores)
	$(BIN)/python tests/simulated/run.py --regressions
	$(BIN)/python tests/simulated/run.py --schedules 20000 --json workspace/proof/schedules.json
	$(BIN)/python tests/simulated/run.py --mutations --limit 300
	$(BIN)/python -m pytest -m proof -n 2 --dist loadfile --no-loadscope-reorder

soak: venv  ## ten minutes of a fleet at work: what grows, and what is left over
	$(BIN)/python tests/chaos/soak.py --seconds 600

chaos: venv  ## twenty faults of each kind that hit, over real processes, sockets and disks (small disks: as root)
	$(BIN)/python tests/chaos/run.py --faults 20 --json workspace/chaos/matrix.json

bench: venv  ## every figure of fedloom beside its reference and target (ARGS=--quick: some six minutes)
	$(BIN)/python benchmarks/run.py --json workspace/bench/results.json $(ARGS)

PEERS := nvflare flower pfl

bench-peers: venv $(PEERS:%=workspace/bench/env-%/.installed)  ## the same work in other systems, side by side (needs Linux, 24 GiB)
	$(BIN)/python benchmarks/run.py --peers --parts fleet --json workspace/bench/peers.json $(ARGS)

bench-report: venv  ## what the two have measured, as tables and plots in docs/performance.md
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/report.py $(wildcard workspace/bench/results.json workspace/bench/peers.json) \
		--docs docs/performance.md --plots docs/performance

# each system in an environment of its own: what they need does not go together
workspace/bench/env-%/.installed: benchmarks/peers/%.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python was found (or set PYTHON=/path/to/python)" >&2; exit 1; }
	test -x workspace/bench/env-$*/bin/python || "$(PYTHON)" -m venv workspace/bench/env-$*
	workspace/bench/env-$*/bin/python -m pip install --quiet -c constraints.txt -r $<
	@touch $@

fuzz: venv  ## every fuzz target with coverage, ten minutes each (needs wheels of atheris: Linux)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,fuzz]"
	$(BIN)/python tests/fuzz/run.py --seconds 600 --jobs 2

clean:  ## what runs and builds left behind, but not .venv
	rm -rf workspace build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis .typing
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## .venv too
	rm -rf $(VENV)

venv: $(STAMP) .typing/fedloom

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fedloom needs Python 3.11 or newer with its venv module; none was found (or set PYTHON=/path/to/python)" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

# type checkers find the package under its own name here: the repository root is the package
.typing/fedloom:
	mkdir -p .typing
	ln -sfn .. .typing/fedloom
