# make demo: the main job, start to end.  make test: linters and every test.
# Both make a virtual environment first, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
CPP := $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: demo test lint format sanitize sanitize-cpu sanitize-cuda fuzz bench gpu clean

demo: $(VENV)/installed
	$(BIN)/placekern demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: sanitize-cpu sanitize-cuda

# The CUDA kernels, emulated: under AddressSanitizer and UndefinedBehaviorSanitizer, under
# ThreadSanitizer, and the proof that each of their barriers is needed.
sanitize-cuda: $(VENV)/installed
	$(BIN)/python tests/cuda_emulation/sanitize.py address thread barriers

# The op tests on a core built with AddressSanitizer and UndefinedBehaviorSanitizer, at every ISA level,
# and damaged files, as what is loaded from them is run.
SANITIZED := build/sanitized
SANITIZED_TESTS := $(addprefix tests/test_,$(addsuffix .py,conv2d linear codebook_groups_ops kmeans_assign \
  kmeans_optimal device_packing io_damage io_random_damage))
sanitize-cpu: $(VENV)/installed
	rm -rf $(SANITIZED)/placekern $(SANITIZED)/tests && mkdir -p $(SANITIZED)
	cp -r csrc placekern tests setup.py CMakeLists.txt pyproject.toml README.md $(SANITIZED)
	rm -f $(SANITIZED)/placekern/*.so
	cd $(SANITIZED) && PATH=$(abspath $(BIN)):$$PATH PLACEKERN_CUDA=off \
	  CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1" \
	  $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -k "not opcheck and not gradcheck" \
	  $(SANITIZED_TESTS)

# The readers of files against damaged ones, for a bounded time; finds stay in build/fuzz.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/installed
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet atheris  # the extra [fuzz]
	mkdir -p build/fuzz/corpus
	$(BIN)/python tests/fuzz/fuzz_load.py -max_total_time=$(FUZZ_SECONDS) \
	  -artifact_prefix=build/fuzz/ build/fuzz/corpus

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds -q

# On a machine with a GPU, with a Python that has torch: build, tests, times and sanitizers in eight
# minutes, without a network. Results go to $(GPU_RESULTS)/gpu-<name>.json and .md, and all that is
# printed to gpu.log.
GPU_PYTHON ?= python3
GPU_RESULTS ?= benchmarks/results
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu.run --results $(GPU_RESULTS)

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	PLACEKERN_WERROR=on PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info placekern/*.so
