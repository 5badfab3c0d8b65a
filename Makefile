# make test: everything that must hold. make demo: the main job on an embedded data set, without account or network.
# make audit: licences and known vulnerabilities of what is installed; needs a network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test demo audit clean

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# What W&B's server decides by. The tests compare with it; its bound on numpy is older than its code needs.
	$(BIN)/python -m pip install --quiet --no-deps sweeps==0.3.0
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile -m "not alone"
	$(BIN)/pytest -m alone

# Four short trials, two of each norm, their ranking, and the page that compares them.
demo: install
	$(BIN)/eva sweep sweeps/smoke.yaml --out=sweeps-out/demo-$(shell date +%Y%m%d-%H%M%S)

audit: install
	$(BIN)/python .ci/audit.py

clean:
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache
