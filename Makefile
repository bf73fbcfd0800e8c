# Two commands on a new machine, each with its set-up:
#
#   make run     builds and does the main job with the small model: data, fine-tune, judge before and after, report
#   make test    builds, fetches the small model (98 MB, once) and runs all tests
#
# and a third to look at: make demo replays a day of posts through the live pipeline, with its page.
#
# Needed: a Rust toolchain (with a C compiler to link), Python 3 with pip, make. Everything else is fetched here: crates by
# cargo, the model and NVIDIA's kernel compiler by pip. No GPU, no CUDA toolkit, nothing to configure.

SHELL := bash
.DEFAULT_GOAL := help
# The steps share one target directory, and `check` has an order.
.NOTPARALLEL:

# rustup's folder is not on the PATH of every shell.
export PATH := $(PATH):$(HOME)/.cargo/bin

CARGO ?= cargo
BUILD := $(or $(CARGO_TARGET_DIR),target)
CASHTAG := $(if $(filter /%,$(BUILD)),,./)$(BUILD)/release/cashtag
# Flags for `make run`: make run ARGS="--seed 7 --full"
ARGS ?=

# NVIDIA's kernel compiler: with it every CUDA kernel is compiled in the tests, on machines without a GPU too.
NVRTC := nvidia-cuda-nvrtc==13.0.88
NVRTC_FOLDER := $(abspath $(BUILD))/nvrtc

# Programs for a second opinion in the tests: readers of our files, a client of our server.
TEST_TOOLS := $(abspath $(BUILD))/test-tools

.PHONY: help toolchain web web-tools build nvrtc test-tools run demo test check format lint bench reference

help:
	@echo 'make run      build, then fine-tune the small model and judge it (ARGS="..." for flags of cashtag run)'
	@echo 'make test     build, fetch the small model, run all tests'
	@echo 'make demo     replay a day of posts into the live page (ARGS="..." for flags of cashtag live)'
	@echo 'make check    format, lints, all tests: the cheapest first'
	@echo 'make build    build $(CASHTAG)'
	@echo 'make bench    measure how fast this machine trains and classifies'

toolchain:
	@command -v $(CARGO) >/dev/null || { echo 'error: there is no cargo'; echo 'hint: https://rustup.rs installs the Rust toolchain'; exit 1; } >&2
	@command -v cc >/dev/null || { echo 'error: there is no C compiler to link with'; echo 'hint: Debian, Ubuntu: apt install gcc'; exit 1; } >&2

# The page of `cashtag live`. Without the registries of npm and pip it says so, and the binary is built without it.
web:
	web/build.sh

# With the type check and the unit tests of the page.
web-tools:
	web/build.sh --tools

build: toolchain web
	$(CARGO) build --release --locked

run: build
	$(CASHTAG) run $(ARGS)

# With the adapter of the newest run, if there is one: the base model was not fine-tuned for this.
NEWEST_ADAPTER = $(addprefix --adapter ,$(lastword $(sort $(wildcard runs/*/adapter))))

demo: build
	$(CASHTAG) live --demo $(NEWEST_ADAPTER) $(ARGS)

# Without it one test says that it skips; so a machine on which pip cannot have it is no reason to stop.
nvrtc:
	@test -d $(NVRTC_FOLDER)/nvidia || { \
		echo 'python3 -m pip install --target $(NVRTC_FOLDER) $(NVRTC)'; \
		PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-input --no-deps --only-binary :all: \
			--target $(NVRTC_FOLDER) '$(NVRTC)' || echo 'no kernel compiler: CUDA kernels will not be compiled in the tests'; }

test-tools:
	@mkdir -p $(TEST_TOOLS)
	@scripts/test-tools.sh $(TEST_TOOLS)

# One build, the program among it: `make build` before it would build every crate once more, because what the tests depend on
# asks the crates that both use for more features. The tools for the tests are fetched meanwhile. What a machine cannot test says
# so in a line "skipped: why"; the lines are listed at the end.
test: toolchain web-tools
	@mkdir -p $(BUILD)
	@$(MAKE) --no-print-directory nvrtc test-tools >$(BUILD)/test-tools.log 2>&1 & tools=$$!; \
	echo '$(CARGO) test --release --locked --workspace --no-run'; \
	$(CARGO) test --release --locked --workspace --no-run; built=$$?; \
	wait $$tools; fetched=$$?; cat $(BUILD)/test-tools.log; exit $$((built ? built : fetched))
	$(CASHTAG) pull smollm2-135m
	@$(CASHTAG) doctor
	set -o pipefail; export CASHTAG_CUDA_LIBS=$(NVRTC_FOLDER)/nvidia/cu13/lib; \
	if [[ -z "$$CASHTAG_TEST_PYTHON" && -x $(TEST_TOOLS)/python ]]; then export CASHTAG_TEST_PYTHON=$(TEST_TOOLS)/python; fi; \
	$(CARGO) test --release --locked --workspace --no-fail-fast -- --show-output 2>&1 | tee $(BUILD)/test.log
	@echo; if grep -q '^skipped' $(BUILD)/test.log; then echo 'Skipped on this machine (times, why):'; \
		grep '^skipped' $(BUILD)/test.log | sort | uniq -c; else echo 'Nothing was skipped.'; fi

check: format lint test

format: toolchain
	$(CARGO) fmt --all --check

lint: toolchain
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings

bench: build
	$(CASHTAG) bench train
	$(CASHTAG) bench classify

# The list of all settings for docs/configuration.md, which a test compares with it: make -s reference
reference: build
	@$(CASHTAG) config --reference
