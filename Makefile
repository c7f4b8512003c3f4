# Every target sets itself up: it needs Python 3.11 or later, a C++ compiler and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
UI := .venv-ui
RAY := .venv-ray
ARGS ?=

# Tests start hundreds of processes of the same modules: their bytecode is kept, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-slow test-cluster test-ray test-clients test-ui screenshots wheel test-wheel docker-test fuzz fuzz-long asan crash kills history recipes faults forgeries stops soak check bounds bench report gpu-check train format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/ready ## Make the virtual environment and build the compiled ops

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "making the virtual environment and compiling the ops; takes a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/cottention build
	@touch $@

serve: setup ## Serve the model that ships in the package (ARGS="--port 9000")
	$(BIN)/cottention serve $(ARGS)

# Each process begins with a part of the tests that lie together and share fixtures, and takes over
# from others when it is done. Tests also wait, for processes, clocks and disks: there is one process
# more than cores. Those that flood and soak leave no core idle.
PARALLEL := --dist worksteal
MORE_THAN_CORES = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

test: setup ## Run the tests with the coverage gate, without those of test-slow
	$(BIN)/python -m pytest -n $(MORE_THAN_CORES) $(PARALLEL) -m "not slow and not cluster" --cov --cov-report=term $(ARGS)

test-slow: setup ## Run the tests that kill, flood, soak or compile for long
	$(BIN)/python -m pytest -n auto $(PARALLEL) -m "slow and not cluster" $(ARGS)

# They wait for leases, checks and restarts. The tests of a module share servers, which are started
# once where one process has them all.
test-cluster: setup ## Run the tests of several servers over a PostgreSQL, behind HAProxy (skips where they are not installed)
	$(BIN)/python -m pytest -n $(MORE_THAN_CORES) --dist loadscope -m cluster $(ARGS)

test-ray: setup $(RAY)/ready ## Test three replicas that Ray Serve keeps alive (skips where PostgreSQL is not installed)
	$(RAY)/bin/python -m pytest -c tests/ray/pytest.ini tests/ray $(ARGS)

# Ray pulls much. The server runs in this environment, as its replicas are processes of Ray.
$(RAY)/ready: pyproject.toml constraints.txt tests/ray/constraints.txt
	$(PYTHON) -m venv $(RAY)
	echo '*' > $(RAY)/.gitignore
	$(RAY)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(RAY)/bin/pip install --quiet --disable-pip-version-check --constraint tests/ray/constraints.txt --editable '.[ray]' pytest pytest-timeout httpx
	@touch $@

# Not those that build libraries of their own.
OPS_TESTS := $(filter-out %_loader.py %_build.py,$(wildcard tests/engine/ops/test_*.py)) \
  tests/engine/models/test_packed.py $(wildcard tests/engine/models/test_fused_*.py)

ASAN := COTTENTION_OPS=compiled COTTENTION_CACHE=build/asan \
	COTTENTION_CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer" \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0

# Both libraries are compiled before the tests: on a busy machine that takes longer than a test may.
# The path is pytest's: the libraries' names depend on where the sources are found.
asan: setup ## Run the op tests under AddressSanitizer (GCC), CUDA's on the host among them
	PYTHONPATH=$(CURDIR)/namespace $(ASAN) $(BIN)/python -c "from cottention.engine import ops; from tests.engine.cuda_on_host import on_host; ops.backend(); on_host()"
	$(ASAN) $(BIN)/python -m pytest -q -o timeout=900 $(OPS_TESTS) $(ARGS)

test-clients: setup $(CLIENTS)/ready ## Test with the clients that people bring (openai, litellm, lm-eval, ...)
	$(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini tests/clients $(ARGS)

fuzz: setup $(CLIENTS)/ready ## Ten minutes of schemathesis against the published description
	COTTENTION_FUZZ_SECONDS=600 $(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini -s tests/clients/test_schemathesis.py

fuzz-long: setup $(CLIENTS)/ready ## 50,000 cases of schemathesis; goes on where it was ended (ARGS="--cases 200000")
	$(CLIENTS)/bin/python -m tests.clients.fuzz_cases $(ARGS)

# The clients pull much, some of it older than what the server is tested with. Node's is optional.
$(CLIENTS)/ready: pyproject.toml tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	echo '*' > $(CLIENTS)/.gitignore
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check --constraint tests/clients/constraints.txt torch==2.13.0
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check --constraint tests/clients/constraints.txt --editable '.[clients]'
	-npm install --silent --no-fund --no-audit --prefix $(CLIENTS)/node openai@7.57.0 \
	  ai@6.0.326 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7
	@touch $@

test-ui: setup $(UI)/ready ## Test the page in Chromium (skips where none is installed)
	$(UI)/bin/python -m pytest -c tests/ui/pytest.ini tests/ui $(ARGS)

screenshots: setup $(UI)/ready ## Take the pictures of the page again that docs/ and README show
	$(UI)/bin/python -m tests.ui.screenshots

# axe-core, which judges accessibility, comes from npm; without it those tests are skipped.
$(UI)/ready: tests/ui/requirements.txt
	$(PYTHON) -m venv $(UI)
	echo '*' > $(UI)/.gitignore
	$(UI)/bin/pip install --quiet --disable-pip-version-check --requirement tests/ui/requirements.txt
	-npm install --silent --no-fund --no-audit --prefix $(UI)/node axe-core@4.14.1
	@touch $@

wheel: setup ## Build a wheel with the compiled ops for all instruction sets inside, into dist/
	PYTHON=$(BIN)/python .ci/build-wheel

test-wheel: wheel ## Install that wheel where there is no compiler, and serve with it
	COTTENTION_TEST_WHEEL=$(abspath dist) $(BIN)/python -m pytest -c tests/wheel/pytest.ini tests/wheel $(ARGS)

crash: setup ## Kill the server two hundred times under load, and look for what is lost
	COTTENTION_CRASH_ROUNDS=200 $(BIN)/python -m pytest -s tests/server/sessions/test_crash.py::test_kill_9_loses_nothing_answered

kills: setup ## Kill servers 20 times under 50 streams of turns that go on, over a PostgreSQL
	COTTENTION_KILLS=20 COTTENTION_KILL_STREAMS=50 $(BIN)/python -m pytest -s --timeout=1800 tests/server/replicas/test_turns_go_on.py::test_killed_under_live_streams

history: setup ## Kill, stop and cut off servers that take turns of the same sessions, for ten minutes
	COTTENTION_HISTORY_SECONDS=600 $(BIN)/python -m pytest -s tests/engine/sessions/store/test_postgres_history.py

recipes: setup ## Compare 200 random sessions of every attention and family as recipes and as whole states
	COTTENTION_RECIPE_SESSIONS=200 $(BIN)/python -m pytest -n auto tests/engine/sessions/test_recipes.py

forgeries: setup ## Import ten thousand forged snapshots
	COTTENTION_FORGERIES=10000 $(BIN)/python -m pytest tests/server/sessions/test_forged_snapshots.py::test_many_forged_snapshots

faults: setup ## Inject a thousand faults under load, and look who fails
	COTTENTION_FAULTS=1000 $(BIN)/python -m pytest -s --show-capture=no tests/server/test_faults.py

stops: setup ## Stop the server fifty times under load, and look who is cut
	COTTENTION_STOP_ROUNDS=50 $(BIN)/python -m pytest -s tests/server/cli/test_stopping.py

docker-test: setup ## Build the CPU image and run the compose service for real (root; skips where it cannot)
	PYTHON=$(BIN)/python tests/containers/run $(abspath $(BIN))/python -m pytest -c tests/containers/pytest.ini tests/containers $(ARGS)

soak: setup ## Half an hour of twice the capacity, a third of the clients misbehaving (ARGS="--minutes 5")
	$(BIN)/python -m benchmarks.soak $(ARGS)

check: setup ## Lint, formatting, types; what docker/ holds, and that no secret is in a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cuda
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml docker/cluster.yaml
	$(BIN)/kubernetes-validate --quiet --strict docker/kubernetes/*.yaml docker/kubernetes/cluster/*.yaml
	$(BIN)/python tests/containers/check.py
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-files '^(tests/|engine/pretrained/)'

bounds: setup ## Send one key's largest requests beside another key's small ones, and compare (ARGS="--quick")
	$(BIN)/python -m benchmarks.bounds $(ARGS)

bench: setup ## Run all benchmarks (ARGS="--quick")
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)

report: setup ## Draw the pictures and write the tables of docs/quality.md (ARGS="--measure default" measures first)
	$(BIN)/python -m benchmarks.report $(ARGS)

gpu-check: ## Test and measure on a GPU, with the Python that is there; ends with 2 where there is none
	PYTHON=$(PYTHON) .ci/gpu-check

train: setup ## Train the default model (resumes from checkpoints/)
	$(BIN)/python -m cottention.engine.training $(ARGS)

format: setup ## Rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(CLIENTS) $(UI) $(RAY) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -name __pycache__ -prune -exec rm -rf {} +
