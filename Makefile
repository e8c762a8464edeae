# Each target sets up .venv by itself, from constraints.txt; a second run starts at once.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies
EXTENSION := $(VENV)/.extension
NATIVE := $(wildcard $(foreach folder,csrc csrc/cpu csrc/python,$(folder)/*.h $(folder)/*.cpp))
CUDA := $(wildcard csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cpp csrc/cuda/*.cu tests/cuda_emulation/*)

SANITIZED := build/sanitize
NATIVE_TESTS := tests/contract tests/test_read.py tests/test_cpu_kernels.py tests/test_norms.py tests/test_concurrency.py tests/test_step.py
DEVICE_TESTS := tests/contract tests/test_cuda_device.py tests/test_cuda_device_step.py tests/test_strategies_device.py tests/test_several_devices.py

.DEFAULT_GOAL := help
.PHONY: help demo test cuda wheel gpu bench lint format sanitize clean

help:  ## Show the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(DEPENDENCIES): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		torch numpy pybind11 setuptools wheel
	FASTCLIP_BUILD_CPP=off $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(EXTENSION): $(DEPENDENCIES) setup.py $(NATIVE)
	FASTCLIP_BUILD_CPP=require FASTCLIP_BUILD_CUDA=off FASTCLIP_WERROR=1 \
		$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(EXTENSION)  ## Show the speed beside torch's, rescue a network from exploding and NaN, search for a better rate.
	$(BIN)/fastclip demo --output demo-output

# The tests of a file share what they compile, so a file stays in one process.
test: $(EXTENSION)  ## Run the test suite in WORKERS processes (2).
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

cuda: $(EXTENSION)  ## Build the CUDA library in place with nvcc.
	$(BIN)/python csrc/cuda/build.py

wheel: $(DEPENDENCIES)  ## Build sdist and wheel in dist/, each in an environment of its own.
	$(BIN)/python -m build --outdir dist

bench: $(EXTENSION)  ## Time clipping beside torch and write benchmarks/results/.
	$(BIN)/fastclip bench --json benchmarks/results/cpu.json --plot benchmarks/results/cpu.png
	$(BIN)/fastclip bench --steps --json benchmarks/results/cpu_steps.json
	$(BIN)/fastclip bench --distributed --json benchmarks/results/cpu_distributed.json
	$(BIN)/fastclip bench --strategies --json benchmarks/results/strategies.json --plot benchmarks/results/strategies.png
	$(BIN)/python benchmarks/update_readme.py

gpu:  ## Test, check and time clipping on a GPU, with the Python that has torch for it; see benchmarks/gpu.py.
	$(PYTHON) -m pytest -m cuda $(DEVICE_TESTS)
	$(PYTHON) benchmarks/gpu.py

lint: $(EXTENSION)  ## Check style and types of Python and C++.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(CUDA)

format: $(EXTENSION)  ## Rewrite Python and C++ in the house style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(CUDA)

# Python itself is not instrumented, so the runtime is preloaded, and leaks of the interpreter are not ours.
sanitize: $(DEPENDENCIES)  ## Run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer.
	FASTCLIP_BUILD_CPP=require FASTCLIP_BUILD_CUDA=off FASTCLIP_SANITIZE=1 $(BIN)/python setup.py --quiet \
		build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib \
		$(BIN)/pytest -p no:cacheprovider -k "not emulated and not interpreted" $(NATIVE_TESTS)

clean:  ## Remove everything that the other targets made.
	rm -rf $(VENV) build dist demo-output *.egg-info fastclip/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
