# make quickstart   build a small DBRX from raw text
# make test         the checks and the whole suite
# make check        format, lint, types
# make bench        the figures in benchmarks/results: three hours; its trainings go on where they were
# make bench-inference   generation beside transformers and llama.cpp, which is built into .peers first
# make exact        300 random models against transformers and a naive NumPy forward
# make stress       longer randomized tests, among them 2,000 hostile command lines as root and as many as a plain user;
#                   the endpoint under malformed requests, overload, kill -9: writes its table
# make faults       kill -9, flipped bits, full disks, lost ranks: writes the table of docs/reliability.md
# make interop      MosaicML Streaming's own reader and writer beside ours, installed into .interop
# make lmeval       lm-eval's log-likelihoods by our server and by transformers, on the quickstart; installed into .lmeval
# make sanitize     the native kernels under the address and undefined-behaviour sanitizers
# All of them set up .venv from the lock first, once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check bench bench-inference exact stress faults interop lmeval sanitize clean

quickstart: .venv/locked
	$(BIN)/gristmill run quickstart

test: check
	$(BIN)/python -m pytest

check: .venv/locked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/locked
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/time_to_quality.py
	$(BIN)/python benchmarks/moe_vs_dense.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/tokenizer.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/neighbors.py

bench-inference: .venv/locked .peers/built
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/serving.py

exact: .venv/locked
	GRISTMILL_EXACT=150 $(BIN)/python -m pytest tests/exact

stress: .venv/locked lmeval
	GRISTMILL_KILLS=40 $(BIN)/python -m pytest tests/test_kill.py tests/serve/test_usage.py
	$(BIN)/python tests/serve/stress/campaign.py --table docs/reliability.md
	GRISTMILL_COMPILE=1 $(BIN)/python -m pytest --hypothesis-profile=stress

faults: .venv/locked
	PYTHONPATH=tests $(BIN)/python tests/faults/campaign.py --table docs/reliability.md

interop: .venv/locked .interop/installed
	GRISTMILL_REQUIRE=interop $(BIN)/python -m pytest tests/interop

lmeval: quickstart .lmeval/installed
	$(BIN)/python tests/lmeval/agreement.py runs/quickstart

SANITIZED := build/sanitized/native.so
sanitize: .venv/locked
	$(BIN)/python setup.py -q sanitize --library $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	GRISTMILL_TEST_LIBRARY=$(SANITIZED) $(BIN)/python -m pytest -p no:cacheprovider tests/kernels/test_native_kernels.py \
	tests/kernels/test_packed_kernels.py tests/kernels/test_team.py

# Made again when the lock or the package's own settings change; a failed install leaves no stamp.
.venv/locked: requirements.lock pyproject.toml setup.py $(wildcard src/gristmill/kernels/native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# What MosaicML Streaming requires excludes what we do, and is large: an environment of its own, with what it imports.
.interop/installed: tests/interop/requirements.txt
	$(PYTHON) -m venv .interop
	.interop/bin/python -m pip install --quiet -r $<
	.interop/bin/python -m pip install --quiet --no-deps mosaicml-streaming==0.13.0
	touch $@

# lm-eval with its backends: an environment of its own, as it brings transformers and much else in other versions.
.lmeval/installed: tests/lmeval/requirements.txt
	$(PYTHON) -m venv .lmeval
	.lmeval/bin/python -m pip install --quiet -r $<
	touch $@

# llama.cpp as fast as gcc makes it for this machine. Its sources are the published ones with a barrier for AMX: gcc 12 may
# write a tile configuration after it was to be loaded. One file at a time: some need a gigabyte.
LLAMA := 0.3.36
LLAMA_FLAGS := -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF
LLAMA_PATCH := s/^ *_tile_loadconfig(&tc);/    __asm__ volatile("" ::: "memory");\n&/
LLAMA_SOURCE := .peers/source/llama_cpp_python-$(LLAMA)
.peers/built:
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -d .peers/source \
		llama-cpp-python==$(LLAMA)
	tar -xzf $(LLAMA_SOURCE).tar.gz -C .peers/source
	sed -i '$(LLAMA_PATCH)' $(LLAMA_SOURCE)/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
	CMAKE_BUILD_PARALLEL_LEVEL=1 CMAKE_ARGS="$(LLAMA_FLAGS)" \
		nice .peers/bin/python -m pip install --quiet numpy==2.4.6 $(LLAMA_SOURCE)
	rm -r .peers/source
	printf 'flags: %s\npatch: %s\n' '$(LLAMA_FLAGS)' 'a memory barrier before _tile_loadconfig (AMX)' > $@

clean:
	rm -rf .venv .interop .lmeval .peers benchmarks/.cache runs
