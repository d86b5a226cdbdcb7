# Two commands do everything, set-up included: `make train` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
WORKERS := -n 2 --dist loadfile
READY := .venv/.ready

.PHONY: proto setup train test test-all check format test-distributed chaos netlab gpu docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# compile once, not in a step
	$(BIN)/python -c "from ray_ep.moe.cpu import kernels; from ray_ep.placement.in_step import rules; from ray_ep.placement.planner import plan; kernels.warm(); rules.warm(); plan.warm()"
	@touch $@

train: setup
	$(BIN)/ray-ep train

test: check  # two workers: most of it waits for processes to start
	$(BIN)/pytest $(WORKERS)

test-all: test  # and what is slow by nature; the lab's measurements have targets of their own
	$(BIN)/pytest -m "slow and not lab"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-distributed: setup
	$(BIN)/pytest -m "not lab" tests/distributed

chaos: setup  # half an hour of faults on 2 cores, then the same steps without
	$(BIN)/ray-ep chaos --minutes 30 --every 28 --faults kill,node,stop,drain,add

netlab: setup  # needs root and iproute2: skipped, with the reason, where they are not
	$(BIN)/pytest -m "lab or slow or not slow" tests/netlab

gpu:  # everything on a machine with a GPU, about six minutes; installs nothing: PYTHON if it is given, else .venv
	$(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) -m tests.gpu

proto: setup  # what is generated from control.proto, and whether it breaks what was released; by buf, too, where it is
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. ray_ep/control/v1/control.proto
	$(BIN)/python -m tests.control.breaking
	@PATH="$(BIN):$$PATH"; if command -v buf >/dev/null; then \
		buf lint && buf breaking --against ray_ep/control/v1/released.binpb; \
	else echo "buf is not installed: neither its lint nor its breaking check was made"; fi

docs: setup
	$(BIN)/python -m ray_ep.config.docs > docs/configuration.md

clean:
	rm -rf .venv build *.egg-info
