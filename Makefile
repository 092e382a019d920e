# Two commands do everything: `make demo` and `make test`. Both set up .venv from the locked versions first.
PYTHON ?= python3
BIN := .venv/bin
# Where Python is told to keep no bytecode (many CI images), each of the hundred processes below compiles torch anew: 10 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint chaos clean

.venv/.ready: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "error: $$($(PYTHON) -V) found, 3.10 to 3.12 is needed: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]'
	@touch $@

demo: .venv/.ready
	$(BIN)/python samples/demo.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not chaos"

chaos: .venv/.ready
	$(BIN)/python -m pytest -m chaos -s

clean:
	rm -rf demo runs build dist .pytest_cache .mypy_cache .ruff_cache
