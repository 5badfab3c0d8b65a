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

# Fast enough for two cores that only know fp32.
demo: install
	$(BIN)/eva train --data=digits --policy=digits --model=resnet9 --epochs=6 --peak_epoch=2 --batch_size=64 \
		--lr_min=find --lr_max=find --find_lr_steps=60 --tracking=offline

clean:
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache
