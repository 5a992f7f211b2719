# Two commands do all set-up: `make demo` runs the main job on the shipped sample, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
ACTIVATE = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test faults lint install resume

demo: install
	$(ACTIVATE) snakemake --cores all
	@$(ACTIVATE) oppu show

test: install
	$(ACTIVATE) python -m pytest -n auto --maxprocesses 8 --dist loadfile

# Fifty SIGKILLs at random points, from split to tables (docs/crashes.md).
faults: install
	$(ACTIVATE) OPPU_FAULTS=fifty python -m pytest -s -p no:cacheprovider tests/faults/test_kill.py

# After a crash or SIGKILL: end jobs that outlived their run, release the lock, go on; what is finished is kept
# (docs/crashes.md). ARGS go to both Snakemake commands.
resume:
	$(ACTIVATE) oppu end-orphans
	$(ACTIVATE) snakemake --unlock $(ARGS)
	$(ACTIVATE) snakemake --cores all --rerun-incomplete $(ARGS)

lint: install
	$(ACTIVATE) ruff format --check .
	$(ACTIVATE) ruff check .
	$(ACTIVATE) mypy
	$(ACTIVATE) snakefmt --check Snakefile workflow
	$(ACTIVATE) snakemake --lint

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "oppu needs Python 3.11 or newer; name one: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.lock
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@
