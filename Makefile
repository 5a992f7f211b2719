# Two commands do all set-up: `make demo` runs the main job on the shipped sample, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
ACTIVATE = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test lint install resume

demo: install
	$(ACTIVATE) snakemake --cores all
	@$(ACTIVATE) oppu show

test: install
	$(ACTIVATE) python -m pytest -n auto --maxprocesses 8 --dist loadfile

# After a crash or SIGKILL: release the lock and go on; what is finished is kept. ARGS go to both commands.
resume:
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
