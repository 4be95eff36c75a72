# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out

# Threads that spin at a barrier starve everything else on a small machine.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test check up bench gpu install tools clean

install: $(STAMP)

# pip, not uv: a torch pinned in constraints.txt may come from a local wheel.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all,dev]"
	touch $@

demo: install
	$(BIN)/rheocast demo --out $(OUT)

up: install
	$(BIN)/rheocast up

# What the tests drive from outside: Chromium, FFmpeg, Prometheus' promtool, docker-compose (it reads compose files without Docker).
# Only what is missing, where root and apt are at hand. And AsyncAPI's own schemas, which npm has.
ASYNCAPI := .tools/node_modules/@asyncapi/specs
TOOLS := chromium:chromium ffmpeg:ffmpeg promtool:prometheus docker-compose:docker-compose
RTSP := python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good
tools:
	@missing=; for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	ls /usr/lib/*/girepository-1.0/GstRtspServer-1.0.typelib >/dev/null 2>&1 || missing="$$missing $(RTSP)"; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing >/dev/null; } || \
	echo "not installed:$$missing; tests that need them are skipped"
	@[ -e $(ASYNCAPI)/schemas/3.0.0.json ] || { command -v npm >/dev/null && \
	  npm install --silent --no-save --no-package-lock --ignore-scripts --prefix .tools @asyncapi/specs@6.11.1; } || \
	echo "not installed: AsyncAPI's schemas (no npm, or it failed); the test that needs them is skipped"

# What computes alone runs in two processes of one thread each; what runs a system has the machine to itself.
test: install tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/property tests/parity tests/integration
	$(BIN)/python -m pytest tests/e2e tests/browser

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.bus
	$(BIN)/python -m bench.system ratio

# For who has a GPU: the tests that need one, then the engine's table. Random weights: 14B needs about 30 GiB of memory.
GPU_BENCH = $(BIN)/python -m bench.engine --device cuda --dtype bfloat16 --random --steps 1,2,3,4 --vae wan,taehv
gpu: install
	$(BIN)/python -m pytest -m gpu
	$(GPU_BENCH) --model wan2.1-1.3b --size 832x480,512x512
	$(GPU_BENCH) --model wan2.1-14b --size 512x512

clean:
	rm -rf $(VENV) $(OUT) .tools
