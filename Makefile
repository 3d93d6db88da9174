# make quickstart: from text to a trained model.  make test: all checks.  make help: the rest.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed-dev
DATA := data/quickstart
PIP := DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart test check clean
help:
	@echo "make quickstart   tokenize the Python standard library, train a small model in two pipeline stages, sample it"
	@echo "make test         format, lint, types and tests"
	@echo "make clean        remove what the quickstart made (data/quickstart, runs/quickstart)"

# The corpus is always there: the source code of this Python's standard library.
quickstart: STDLIB = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
quickstart: CODE = $(STDLIB) --include '*.py' --exclude test --exclude tests --exclude idle_test --exclude site-packages \
	--exclude encodings --exclude pydoc_data
quickstart: $(INSTALLED)
	$(BIN)/depthpipe tokenizer train $(CODE) --out $(DATA)/tokenizer.model --vocab-size 4096
	$(BIN)/depthpipe tokenize $(CODE) --tokenizer $(DATA)/tokenizer.model --out $(DATA) --validation-fraction 0.15
	$(BIN)/depthpipe train configs/quickstart.yaml
	$(BIN)/depthpipe monitor runs/quickstart --once
	$(BIN)/depthpipe generate runs/quickstart --prompt 'def __init__(self' --temperature 0.5 --max-tokens 120

check: $(INSTALLED_DEV)
	@$(BIN)/ruff format --check --quiet . || { echo "ruff: not formatted; run $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

test: check
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest

clean:
	rm -rf $(DATA) runs/quickstart

# torch first and exactly: what depends on it then takes this one. deepspeed's build needs it, and compiles nothing.
$(INSTALLED): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "depthpipe needs Python 3.11 or newer on PATH (Debian: apt install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing (Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into .venv (once; torch is large)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch setuptools wheel
	@$(PIP) numpy packaging ninja psutil py-cpuinfo pydantic
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "installing what the tests need into .venv (once)"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
