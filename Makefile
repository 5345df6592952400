# Every target sets up what it needs; see scripts/setup.
PROTOS := $(shell find proto -name '*.proto')

.PHONY: check test run bench sim lock proto

check: ## format, lint, types, import contracts
	scripts/setup --dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports

test: ## everything that CI runs
	scripts/test

run: ## the OCR example
	scripts/run

bench: ## every benchmark, quickly; each has --help
	scripts/setup --dev
	.venv/bin/python scripts/bench_planner.py --quick
	.venv/bin/python scripts/bench_workers.py
	.venv/bin/python scripts/bench_gateway.py --quick
	.venv/bin/python scripts/bench_slo.py --quick
	.venv/bin/python scripts/bench_residency.py --quick

sim: ## the dispatcher in virtual time; SEED=n replays one seed, SEEDS=n runs so many
	scripts/setup --dev
	.venv/bin/python -m tests.simulation.replay $(if $(SEED),--seed $(SEED)) \
	  $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST))

lock: ## resolves the dependencies of pyproject.toml anew
	scripts/setup --dev
	.venv/bin/uv pip compile --universal --generate-hashes --python-version 3.11 --no-header -q \
	  --extra example --extra s3 --extra gpu --group build -o requirements.lock pyproject.toml
	.venv/bin/uv pip compile --universal --generate-hashes --python-version 3.11 --no-header -q \
	  --group pyproject.toml:dev -c requirements.lock -o requirements-dev.lock

proto: ## generates the stubs of proto/ into server/
	scripts/setup --dev
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m grpc_tools.protoc -I proto \
	  --python_out=server --mypy_out=server --grpc_python_out=server --mypy_grpc_out=server $(PROTOS)
