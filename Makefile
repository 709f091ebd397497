# make quickstart   environment, then the main job on the example pair: a few minutes on 2 cores
# make test         environment, then the whole test suite
# make test-bare    the same as on a machine without Slurm, Chromium, compiler and test data
# make test-megatron   what touches Megatron, with the pinned megatron-core and the one before
# make slurm-test   environment, then jobs and faults under a real Slurm of two nodes on this
#                   machine (root; apt-get install slurm-wlm munge): 10 minutes on 2 cores
# make env          environment only (.venv); instant when nothing changed
# make lint         ruff and mypy; part of make test
# make check-docs   committed numbers and listings against the texts that show them
# make site         build/site: every text as a page, with the public API; needs the extra docs
# make mutations    break the code in many ways: a fast test must catch each (minutes)

PYTHON_ENV := .venv/bin
QUICKSTART := runs/quickstart
# The example has two ranks; each needs a GPU to itself where there are any.
ONE_GPU := $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU '))
QUICKSTART_LAYOUT := $(if $(ONE_GPU),parallel.tensor=1 rollout.num_engines=1)

.PHONY: quickstart test test-bare test-megatron slurm-test lint check-docs site mutations env

# A finished run gives way to a new one; an interrupted run is resumed by the same command.
quickstart: env
	@if [ -f $(QUICKSTART)/summary.json ]; then rm -rf $(QUICKSTART); fi
	@$(PYTHON_ENV)/tropd distill examples/arithmetic/tropd.toml run.dir=$(QUICKSTART) $(QUICKSTART_LAYOUT)

# Three workers (tests/side_by_side.py); one if files are named, or if all share GPUs.
WORKERS := $(if $(TESTS)$(shell nvidia-smi -L 2>/dev/null | grep '^GPU '),0,3)

# Ranks and engines import the package; where PYTHONDONTWRITEBYTECODE is set, each would compile it.
test: env
	@$(PYTHON_ENV)/python -m compileall -q megatron_tropd tests slurm
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON_ENV)/python -m pytest -n $(WORKERS) $(TESTS)

test-bare: export TROPD_TEST_HIDE = all
test-bare: test

test-megatron: env
	@tools/megatron_versions.sh $(VERSIONS)

slurm-test: env
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TROPD_SLURM_TESTS=1 $(PYTHON_ENV)/python -m pytest \
		$${TESTS:-tests/slurm}

lint: env
	@$(PYTHON_ENV)/ruff check .
	@$(PYTHON_ENV)/ruff format --check .
	@$(PYTHON_ENV)/mypy

check-docs: env
	@$(PYTHON_ENV)/python -m pytest -q tests/texts

site: env
	@$(PYTHON_ENV)/python -m mkdocs build --strict --quiet

mutations: env
	@$(PYTHON_ENV)/python tests/mutate.py $(ONLY)

env:
	@tools/setup_env.sh
