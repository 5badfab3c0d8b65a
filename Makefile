# make test: everything that must hold. make demo: the main job on an embedded data set, without account or network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test demo clean

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# Four short runs, two of each norm, and the page that compares them. Fast enough for two cores that only know fp32.
RUNS := runs/demo-$(shell date +%Y%m%d-%H%M%S)

demo: install
	@set -e; for norm in batch layer; do for seed in 0 1; do \
		echo "--- $$norm norm, seed $$seed"; \
		$(BIN)/eva train --data=digits --policy=digits --model=resnet9 --norm=$$norm --seed=$$seed --epochs=4 --peak_epoch=1 \
			--batch_size=64 --lr_min=find --lr_max=find --find_lr_steps=50 --tracking=offline --out=$(RUNS)/$$norm-$$seed; \
	done; done
	@echo "--- comparison"; $(BIN)/eva compare $(RUNS) --out=$(RUNS)

clean:
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache
