# Two commands do everything: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# torch's and numba's threads would otherwise spin against each other for the cores
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint types docs-run setup clean

demo: $(READY)
	$(BIN)/mxmoe demo

test: lint types $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

setup: $(READY)

# A wheel of the CPU build of torch is pinned in constraints.txt: a bare `torch` brings gigabytes of CUDA along.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(cat constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(READY)

clean:
	rm -rf .venv build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis
