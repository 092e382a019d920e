# Two commands do everything: `make demo` and `make test`. Both set up .venv from the locked versions first.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
# Where Python is told to keep no bytecode (many CI images), each of the hundred processes below compiles torch anew: 10 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-oldest test-oldest-core lint docs chaos gpu lock clean

.venv/.ready: setup.cfg constraints.txt overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "error: $$($(PYTHON) -V) found, 3.11 to 3.13 is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override overrides.txt -c constraints.txt -e '.[test]'
	@touch $@

# What plain pip resolves to, by the pins of Composer and streaming: the oldest versions that are supported.
.venv-oldest/.ready: .venv/.ready constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(BIN)/uv pip install --quiet --python $(OLDEST)/python -c constraints-oldest.txt -e '.[test]'
	@touch $@

demo: .venv/.ready
	$(BIN)/python samples/demo.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not chaos and not gpu"

# The same on the oldest stack; with both at hand, also that each goes on with what the other made.
test-oldest: .venv-oldest/.ready
	$(OLDEST)/python -m pytest -n 2 --dist worksteal -m "not chaos and not gpu"

# Of these the tests that depend on torch and transformers most, for CI.
test-oldest-core: .venv-oldest/.ready
	$(OLDEST)/python -m pytest -n 2 --dist worksteal tests/test_versions.py tests/test_recipe.py tests/convert/encode/test_equivalence.py \
		tests/train/test_both_stacks.py tests/train/step/test_model.py tests/train/step/test_rotary.py tests/train/test_export_hf.py tests/train/export \
		tests/train/step/test_gpu_paths.py tests/train/data/test_state.py

# The site, from docs/: a link that leads nowhere ends it. To read it: python -m http.server -d site
docs: .venv/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override overrides.txt -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/site_pages.py build/pages
	$(BIN)/zensical build --strict --clean

chaos: .venv/.ready
	$(BIN)/python -m pytest -m chaos -s

gpu: .venv/.ready
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python bench/gpu.py

# Newer versions within what setup.cfg and overrides.txt allow; the oldest stack keeps what it has, beside what is new.
lock: .venv/.ready
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 setup.cfg --extra test -c constraints-oldest.txt \
		--no-header --no-annotate -o constraints-oldest.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --override overrides.txt setup.cfg --extra test --extra docs \
		--no-header --no-annotate -o constraints.txt

clean:
	rm -rf demo runs build dist site .pytest_cache .mypy_cache .ruff_cache
