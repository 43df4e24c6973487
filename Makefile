# make chat: set up .venv, then talk to the bundled model. make convert, make finetune: add what these commands need.
# make test: set up .venv, then run the tests.
# Options: PYTHON=python3.12 (which Python makes .venv), BACKEND=cpu|cuda|hip|metal|vulkan|auto (remembered).

PYTHON ?= python3
BACKEND ?=
INSTALL = $(PYTHON) -m tools.install --backend "$(BACKEND)"

.PHONY: chat convert finetune test lint bench clean

chat:
	@$(INSTALL)
	@.venv/bin/koala chat

convert:
	@$(INSTALL) --extra convert
	@.venv/bin/koala quantize --help

finetune:
	@$(INSTALL) --extra convert --extra finetune --extra qlora --extra 8bit
	@.venv/bin/koala finetune --help

test:
	@$(INSTALL) --extra test
	@.venv/bin/python -m pytest

lint:
	@$(INSTALL) --extra test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@# mypy does not see the mapping of packages in pyproject.toml: lay the folders out as they are installed.
	@mkdir -p .mypy_cache/tree/koala_local && ln -sfn $(CURDIR)/koala_local/* $(CURDIR)/convert $(CURDIR)/finetune .mypy_cache/tree/koala_local
	.venv/bin/mypy

bench:
	@$(INSTALL) --extra test
	@.venv/bin/python -m benchmarks

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
