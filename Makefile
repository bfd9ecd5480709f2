# `make demo` and `make test` work on a fresh machine with Python 3.10-3.13, a C++ compiler and make.

PYTHON ?= python3
BIN    := .venv/bin
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
PROMPT ?= Write a long story about a lighthouse keeper who finds a letter in a bottle, chapter by chapter.

# An engine that does not compile is an error to look at here; with 0 the package installs without it.
export TOKENSWIFT_STRICT_BUILD ?= 1

# What the installed package is made from, Python aside: an editable install takes that from here.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt \
           $(shell find kernels/cpu -name CMakeLists.txt -o -name '*.cpp' -o -name '*.h' 2>/dev/null)
# Those that the machine has not are taken from PyPI.
BUILD_TOOLS := scikit-build-core nanobind $(if $(shell command -v cmake),,cmake) $(if $(shell command -v ninja),,ninja)

.PHONY: help install demo serve test soak check bench gpu report sanitize sanitize-address sanitize-thread aarch64 kernels clean

help:
	@echo "make demo     write a real text with the default model, beside the plain decoding of it"
	@echo "make serve    the default model behind OpenAI's API (make serve ARGS='--port 9000 --model DIR')"
	@echo "make test     run all tests (make test ARGS='-k layers' for some)"
	@echo "make soak     the tests that take minutes: kills at random moments"
	@echo "make check    ruff, clang-format, headers of the C++ engine that stand alone, and mypy"
	@echo "make bench    a short benchmark"
	@echo "make gpu      on a machine with a GPU: whether it is right there, and how fast (ARGS=--tiny exercises it without)"
	@echo "make report   results/report.html, one page of all that the experiments have left in results/"
	@echo "make sanitize tests of the C++ engine under ASan+UBSan and TSan"
	@echo "make aarch64  tests of the C++ engine built for aarch64, emulated (Debian)"
	@echo "make kernels  compile the Triton kernels for GPUs that are not here (make kernels ARGS='--targets sm_90')"
	@echo "make install  only install into .venv (the others do so by themselves)"
	@echo "make clean    remove what was built, .venv too"

install: .venv/.installed

# --no-build-isolation: the build tools are the pinned ones, and unchanged C++ is not compiled again.
.venv/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt $(BUILD_TOOLS)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c "import tokenswift_py.kernels.cpu._native" 2>/dev/null \
		&& echo "The C++ engine is built." || echo "The C++ engine is not built: the torch engine works without it."
	@touch $@

demo: install
	$(BIN)/python generate.py --model smollm2-135m --dtype fp32 --max-new-tokens 320 --baseline --seed 7 \
		--temperature 0.8 --min-p 0.05 --dry-multiplier 0.8 --prompt "$(PROMPT)"

serve: install
	$(BIN)/tokenswift serve $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

soak: install
	$(BIN)/python -m pytest -m soak $(ARGS)

# mypy needs the package as installed, without the editable install's redirections; nothing is compiled for it.
check: install
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find kernels/cpu -name '*.cpp' -o -name '*.h')
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S kernels/cpu -B build/headers -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/headers --target headers --parallel >/dev/null
	rm -rf build/check
	SKBUILD_WHEEL_CMAKE=false $(PIP) install --quiet --no-deps --no-build-isolation --target build/check .
	cd build/check && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		-p tokenswift_py

bench: install
	$(BIN)/python experiments/steps.py --contexts 64,1024,4096 --rows 1,8 --rounds 7

# In the machine's own Python: one that is lent for minutes has no network to install from (see the script's --pack).
gpu:
	$(PYTHON) experiments/gpu_check.py $(ARGS)

report: install
	$(BIN)/python experiments/report.py

# The tests of the C++ engine under AddressSanitizer with UBSan, then under ThreadSanitizer; each can be made alone.
sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: sanitize-%: install
	PYTHON=$(BIN)/python kernels/cpu/sanitize.sh $* $(ARGS)

# The C++ engine cross-compiled for aarch64, its tests under qemu-user.
aarch64: install
	PYTHON=$(BIN)/python kernels/cpu/aarch64.sh $(ARGS)

# Every kernel, type and head size for sm_80, sm_90, sm_100, sm_120 and gfx942; fails on spills and on shared memory.
kernels: install
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install -c constraints.txt triton
	env -u TRITON_INTERPRET $(BIN)/python -m tokenswift_py.kernels.triton.compile $(ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f kernels/cpu/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
