# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Each makes .venv first, once.
#
# Which torch: pip decides by its own settings. On Linux plain pip takes the CUDA build; on a machine without a GPU point it at the
# small CPU build, by pip's configuration or with TORCH_INDEX=<address of PyTorch's CPU index>.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
OUT ?=
CASES ?=
WORKERS ?= 2
USERS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
STAMP := $(VENV)/.installed
# Tests of a file run one after the other, files side by side, in the order of their names: the longest tests are not the last ones.
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 12
TREE := build/types/efficientvlm

OTHERS := test-oldest test-newest test-latest

.PHONY: quickstart test test-slow cases $(OTHERS) lint types format pins install clean

quickstart: $(STAMP)
	$(BIN)/evlm run quickstart $(if $(OUT),--out "$(OUT)")

test: lint
	$(BIN)/$(PYTEST)

test-slow: $(STAMP)
	$(BIN)/$(PYTEST) -m slow

# The tests with other versions than the pinned ones, each in an environment of its own: all lower bounds; the newest within the bounds; the
# newest there is (of torch within its bounds), which is how a bound is raised.
$(OTHERS): test-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy finds packages by folder, and cli/ and recipes/ lie elsewhere than their names say (package-dir in pyproject.toml). So it is given
# the tree that an installation would have, made of links. Plain `mypy` in the root checks the same without cli/.
types: $(STAMP)
	@rm -rf build/types && mkdir -p $(TREE)
	@ln -s "$(CURDIR)"/efficientvlm/* "$(CURDIR)/cli" "$(CURDIR)/recipes" $(TREE)/
	cd build/types && $(abspath $(BIN))/mypy --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (some minutes on a slow line)"
	@$(PIP) --constraint constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "installing efficientvlm and its tools"
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# A fresh environment each time that the bounds change, or when it is removed: what is newest changes with the day.
OTHER_PIP = $(VENV)-$*/bin/python -m pip --disable-pip-version-check install -qq
$(VENV)-%/.installed: pyproject.toml tests/bounds.py
	@rm -rf $(VENV)-$* && $(PYTHON) -m venv $(VENV)-$*
	@$(OTHER_PIP) packaging
	@$(VENV)-$*/bin/python tests/bounds.py $* > $(VENV)-$*/versions.txt
	@echo "installing the $* versions"
	@$(OTHER_PIP) "$$(grep '^torch[<>=]' $(VENV)-$*/versions.txt)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(OTHER_PIP) --requirement $(VENV)-$*/versions.txt
	@$(OTHER_PIP) --no-deps --editable .
	@touch $@

# constraints.txt from what is installed in $(VENV); the lines of comment stay.
pins: $(STAMP)
	@{ grep '^#' constraints.txt; $(BIN)/python tests/bounds.py pins; } > constraints.new && mv constraints.new constraints.txt
# Scripts that each show whether a fault is there: make cases CASES=FOLDER [USERS="root nobody"]
cases: $(STAMP)
	@test -n "$(CASES)" || { echo "which folder of cases? make cases CASES=FOLDER"; exit 2; }
	$(BIN)/python tests/run_cases.py "$(CASES)" --evlm $(abspath $(BIN))/evlm $(addprefix --user ,$(USERS))

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-latest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
