# One command each, from a bare checkout: `make quickstart`, `make test`. Needs GNU make and Python 3.11 or newer.
#
#   make test ARGS="tests/engine -k noise"     hand arguments to pytest
#   make test JOBS=2                           run at most two test processes at once
#   make setup PYTHON=/path/to/python3         choose the interpreter of a new .venv
#   make aot TRITON=3.6.0                      compile with another Triton than the pinned one (also: promises, emulate)

.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
CONSTRAINTS := constraints.txt
PY := $(VENV)/bin/python
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
ARGS ?=
TRITON ?=
JOBS ?= 8
PARALLEL = $(PY) -m pytest -n auto --maxprocesses $(JOBS) --dist loadfile

# --- the environment ---------------------------------------------------------------------------------------

# Prints the first interpreter that will do. Each candidate is run, not looked up: a version manager may leave
# a python3.12 on the path that only says that it is not installed.
define find_python
if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3.12 python3.11 python3; fi
refused=
for candidate do
  if ! version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    why="does not run"
  elif ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    why="is Python $$version"
  elif ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
    why="is Python $$version without the venv module's ensurepip (Debian and Ubuntu: install python$$version-venv)"
  else
    echo "$$candidate"
    exit 0
  fi
  refused="$$refused
  $$candidate $$why"
done
echo "No usable Python: 3.11 or newer with venv and ensurepip is needed. Tried:$$refused" >&2
echo "Name one with: make PYTHON=/path/to/python3 ..." >&2
exit 1
endef

# Also runs when the interpreter behind an existing environment is gone (a dangling link), and then starts afresh.
$(PY): export FIND_PYTHON = $(find_python)
$(PY):
	@python=$$(sh -c "$$FIND_PYTHON") || exit 1; \
	echo "Creating $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV) || { \
	  rm -rf $(VENV); echo "$$python -m venv failed: see above" >&2; exit 1; }

# Build isolation does not see -c: the two exported variables (pip before and after 25.3) pin the build as well.
# The path stays relative because pip splits the variable at blanks.
$(BASE) $(DEV): export PIP_CONSTRAINT := $(CONSTRAINTS)
$(BASE) $(DEV): export PIP_BUILD_CONSTRAINT := $(CONSTRAINTS)

define install
@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null || { \
  echo "$(VENV) has no pip and cannot make one: remove $(VENV) and run make again" >&2; exit 1; }
$(PY) -m pip install -c $(CONSTRAINTS) -e '$(1)'
endef

$(BASE): $(PY) pyproject.toml $(CONSTRAINTS)
	$(call install,.)
	@touch $@

$(DEV): $(PY) pyproject.toml $(CONSTRAINTS)
	$(call install,.[dev])
	@touch $(BASE) $@

# --- targets -----------------------------------------------------------------------------------------------

.PHONY: help setup quickstart test oldest newest fuzz stops mutants aot promises emulate rehearse gate tables lint types check clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

setup: $(DEV) ## make .venv and install the package with everything for development

quickstart: $(BASE) ## sample images with the bundled model into out/quickstart
	$(VENV)/bin/pixelflow quickstart --output out/quickstart $(ARGS)

# Triton decides at import whether it interprets, so those tests have processes of their own. As many run at once as there
# are cores, up to JOBS; a file's tests stay together, for what they set up once. Threads of torch that wait for one another
# would be in the other processes' way, so each process has one.
ifeq ($(strip $(ARGS)),)
test: export OMP_NUM_THREADS := 1
endif
test: $(DEV) ## run the tests; with ARGS, one pytest run with these arguments
ifeq ($(strip $(ARGS)),)
	@code=0; \
	$(PARALLEL) -m "not interpret" --durations=15 || code=$$?; \
	TRITON_INTERPRET=1 $(PARALLEL) -p no:cacheprovider -m interpret || code=$$?; \
	exit $$code
else
	$(PY) -m pytest $(ARGS)
endif

# What nobody installs by default is what breaks unseen. Their torch brings gigabytes of CUDA; they may call newer
# libraries in ways that those warn of.
oldest: ## run the tests with the oldest versions that pyproject.toml allows
	@mkdir -p build
	sed -n 's/.*"\([a-z-]\{1,\}\)>=\([0-9.]*\)["; ].*/\1==\2/p' pyproject.toml > build/oldest.new
	if cmp -s build/oldest.new build/oldest.txt; then rm build/oldest.new; else mv build/oldest.new build/oldest.txt; fi
	PYTEST_ADDOPTS="-W ignore::DeprecationWarning" $(MAKE) test VENV=build/oldest CONSTRAINTS=build/oldest.txt

# What newer versions warn of is for later; what fails with them is for now.
newest: ## run the tests with the newest versions that pip finds
	PYTEST_ADDOPTS="-W ignore::DeprecationWarning -W ignore::FutureWarning" \
	  $(MAKE) test VENV=build/newest CONSTRAINTS=/dev/null

# A normal run draws few packs, the same each time.
fuzz: export PIXELFLOW_FUZZ ?= 20
fuzz: $(DEV) ## run the kernels' tests on PIXELFLOW_FUZZ (20) times as many packs, drawn at random
	$(PY) -m pytest tests/kernels -m "not interpret" $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels -m interpret $(ARGS)

stops: $(DEV) ## stop training at random, 20 times for each of 0 and 2 workers, 1 and 2 ranks; ARGS="--seed 7" again
	cd tests && ../$(PY) -m support.stops $(ARGS)

mutants: $(DEV) ## break the kernels in every way that we thought of, and see that the tests notice
	cd tests && ../$(PY) -m mutants $(ARGS)

# Another Triton stands in a folder of its own, before the environment's on the path.
OTHER := $(if $(TRITON),build/triton-$(TRITON))
build/triton-%: $(DEV)
	rm -rf $@.part
	$(PY) -m pip install --quiet --no-deps --target $@.part triton==$*
	mv $@.part $@
aot promises emulate: export PYTHONPATH = $(OTHER)

aot: $(DEV) $(OTHER) ## compile every kernel for GPUs that are not there; cubins and figures in build/aot
	$(PY) -m pixelflow_kernels.aot --json build/aot/report.json --cubins build/aot/cubins $(ARGS)

promises: $(DEV) $(OTHER) ## compile a sample of them and hold it to what it promises
	$(if $(TRITON),$(PY) -c 'import triton; assert triton.__version__ == "$(TRITON)"')
	$(PY) -m pytest tests/kernels/test_machine_code.py $(ARGS)

emulate: export PIXELFLOW_EMULATE := all
emulate: $(DEV) $(OTHER) ## run compiled kernels on the PTX emulator: their tests, the engine's and a training step's
	$(PARALLEL) $(wildcard tests/*/test_*_emulated.py) tests/kernels/test_emulator.py $(ARGS)

# The device is torch's modes and doubles around each test; kernels are emulated, or computed in plain PyTorch.
REHEARSE = $(PARALLEL) -p support.rehearsal -m gpu
rehearse: export PYTHONPATH = tests
rehearse: export OMP_NUM_THREADS := 1
rehearse: $(DEV) ## run the tests for GPUs on a simulated device; ARGS="tests/kernels/test_rope2d_gpu.py" for some
ifeq ($(strip $(ARGS)),)
	@code=0; \
	PIXELFLOW_REHEARSE_KERNELS=plain $(REHEARSE) tests/engine tests/benchmarks || code=$$?; \
	$(REHEARSE) tests/training tests/kernels || code=$$?; \
	exit $$code
else
	$(REHEARSE) $(ARGS)
endif

tables: $(DEV) ## fill the tables of the documentation in from benchmarks/results
	$(VENV)/bin/pixelflow bench tables README.md docs/ablations.md docs/benchmarks.md docs/digits.md docs/kernels.md docs/performance.md $(ARGS)

gate: $(DEV) ## compare counts, machine code and CPU ratios with benchmarks/baselines.json
	$(VENV)/bin/pixelflow bench gate $(ARGS)

lint: $(DEV) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DEV) ## mypy, strict
	$(PY) -m mypy

check: lint types test ## lint, types and test

clean: ## remove build outputs and caches; .venv, out and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
