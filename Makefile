# Two commands on a fresh machine: `make demo` and `make test`. They need make, git and Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
DESCRIPTION := setup.cfg pyproject.toml constraints.txt

.PHONY: help demo test test-settings test-mutants clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install into $(VENV), train a capsule network on handwritten digits, print accuracy and pictures"
	@echo "make test    install into $(VENV) with the test extra, run the whole suite, two files at a time (PYTEST_ARGS=... to choose)"
	@echo "make test-settings   the suite on other instructions, threads, orders and numbers, hours (SETTINGS_ARGS='-m numerics')"
	@echo "make test-mutants    show which wrong products the suite notices: a kept list, or random ones of FILE=... (slow)"
	@echo "make clean   remove $(VENV) and caches; runs under lightning_logs stay"
	@echo "PYTHON=python3.12 chooses the interpreter (now: $(PYTHON))"

demo: $(VENV)/installed
	$(VENV)/bin/lightning-plugins fit --config capsnet/digits

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-settings: $(VENV)/installed-test
	$(VENV)/bin/python tests/helpers/machine_settings.py $(SETTINGS_ARGS)

# For maintainers: tests/helpers/mutants says how, docs/mutants.md what came of it. MUTANTS_ARGS=--help names the options.
test-mutants: $(VENV)/installed-mutants
	PYTHONPATH=tests/helpers nice $(VENV)/bin/python -m mutants $(FILE) $(MUTANTS_ARGS)

# A stamp is written only after pip has succeeded, so an interrupted installation is taken up again.
$(VENV)/installed: $(DESCRIPTION) | $(VENV)/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(DESCRIPTION) | $(VENV)/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/installed-mutants: $(DESCRIPTION) | $(VENV)/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,mutants]"
	@touch $@

$(VENV)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: $(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is older than 3.10: install a newer Python and name it: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) has no venv: on Debian or Ubuntu run  sudo apt install python3-venv"; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
