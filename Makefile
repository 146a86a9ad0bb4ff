# Two commands on a fresh machine: `make demo` and `make test`. They need make, git and Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
DESCRIPTION := setup.cfg pyproject.toml constraints.txt

.PHONY: help demo lint types test test-fast cov test-settings test-faults test-wild test-support test-chains test-mutants test-oldest test-clients clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install into $(VENV), train a capsule network on handwritten digits, print accuracy and pictures"
	@echo "make test    install into $(VENV) with the test extra, run the whole suite, two files at a time (PYTEST_ARGS=... to choose)"
	@echo "make lint    ruff, codespell and yamllint over every file under version control"
	@echo "make types   basedpyright: no error, and in the folders that still have some no more than there were"
	@echo "make test-fast   the parts' short tests, one case of each: under 90 seconds on two cores"
	@echo "make cov     make test, and which files it runs less than 90 % of"
	@echo "make test-settings   the suite on other instructions, threads, orders and numbers, hours (SETTINGS_ARGS='-m numerics')"
	@echo "make test-faults   kill, signal and starve runs of every module, and let them go on: six minutes"
	@echo "make test-wild   all our callbacks on modules of every kind, in every setting, and write the table of docs/wild.md"
	@echo "make test-support   every model in every mode of several processes, the lines that start them, and docs/support.md"
	@echo "make test-chains   random chains of stops and resumes, CHAINS=20 of each kind: half an hour"
	@echo "make test-oldest   make test with the oldest versions of setup.cfg, in $(OLDEST) under Python 3.11, without the tests"
	@echo "                   that are slow or start several processes"
	@echo "make test-clients   exported folders in the oldest and newest transformers and diffusers that their cards name"
	@echo "make test-mutants   show which wrong products the suite notices: a kept list, or random ones of FILE=... (slow)"
	@echo "make clean   remove $(VENV), $(OLDEST) and caches; runs under lightning_logs stay"
	@echo "PYTHON=python3.12 chooses the interpreter (now: $(PYTHON))"

demo: $(VENV)/installed
	$(VENV)/bin/lightning-plugins fit --config capsnet/digits

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/pre-commit run --all-files

types: $(VENV)/installed-dev
	$(VENV)/bin/python tests/helpers/type_errors.py

# tests/conftest.py chooses: of each test in the folders of the parts and of what they share, the first case. Left out are
# the other cases, the documentation's examples, what starts processes or trains for long (marks `ddp` and `slow`), draws,
# compiles or goes through the modes of training (test_*_modes.py), and the folders cli, distributed, faults, gates, recipes, robustness and wild.
test-fast: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m fast tests $(PYTEST_ARGS)

cov: $(VENV)/installed-dev
	$(VENV)/bin/python -m coverage erase
	$(VENV)/bin/python -m coverage run -m pytest -n 2 --dist loadfile $(PYTEST_ARGS); status=$$?; \
		$(VENV)/bin/python -m coverage combine --quiet && \
		$(VENV)/bin/python -m coverage report --sort=cover | awk '$$NF + 0 < 90 || /^TOTAL/'; exit $$status

test-settings: $(VENV)/installed-test
	$(VENV)/bin/python tests/helpers/machine_settings.py $(SETTINGS_ARGS)

test-faults: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 2 -m "slow or not slow" tests/faults $(PYTEST_ARGS)

# The table is written when every cell is as it should be.
test-wild: $(VENV)/installed-test
	results=$$(mktemp) && trap 'rm -f "$$results"' EXIT && \
		WILD_RESULTS=$$results $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "slow or not slow" \
			--ignore tests/wild/test_wild_table.py tests/wild $(PYTEST_ARGS) && \
		PYTHONPATH=tests/helpers $(VENV)/bin/python -m wild.table $$results

# The table is written when every cell is as it should be.
test-support: $(VENV)/installed-test
	results=$$(mktemp) && trap 'rm -f "$$results"' EXIT && \
		SUPPORT_RESULTS=$$results $(VENV)/bin/python -m pytest -m "slow or not slow" tests/distributed \
			--deselect tests/distributed/test_support.py::test_the_page_has_every_part_and_mode $(PYTEST_ARGS) && \
		PYTHONPATH=tests/helpers $(VENV)/bin/python -m support.table $$results

test-oldest: $(OLDEST)/installed-test
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not ddp" $(PYTEST_ARGS)

test-clients: $(VENV)/installed-test
	CLIENTS=1 $(VENV)/bin/python -m pytest -k "versions_named" tests/unilm/test_export.py tests/sid/test_sid_export.py $(PYTEST_ARGS)

CHAINS ?= 20
test-chains: $(VENV)/installed-test
	CHAINS=$(CHAINS) $(VENV)/bin/python -m pytest -n 2 tests/callbacks/test_exact_resume.py tests/robustness/test_chains.py

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

$(VENV)/installed-dev: $(DESCRIPTION) | $(VENV)/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	@touch $@

$(VENV)/installed-mutants: $(DESCRIPTION) | $(VENV)/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,mutants]"
	@touch $@

$(OLDEST)/installed-test: setup.cfg pyproject.toml constraints-oldest.txt | $(OLDEST)/python
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	@touch $@

SUITABLE = sys.version_info >= (3, 10)
WANTED = Python 3.10 or newer
# Later ones have no wheels of the oldest versions.
$(OLDEST)/python: PYTHON = python3.11
$(OLDEST)/python: SUITABLE = sys.version_info[:2] == (3, 11)
$(OLDEST)/python: WANTED = Python 3.11

$(VENV)/python $(OLDEST)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: $(PYTHON) not found: install $(WANTED), or name one: make ... PYTHON=/its/path"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not ($(SUITABLE)))' || \
		{ echo "make: $(PYTHON) is not $(WANTED): install one and name it: make ... PYTHON=/its/path"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) has no venv: on Debian or Ubuntu run  sudo apt install python3-venv"; exit 1; }
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(@D)
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
