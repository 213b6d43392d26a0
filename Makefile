# Two commands for a newcomer: `make quickstart` and `make test`. Everything else serves them.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Processes that share the tests, a file at a time.
TEST_WORKERS ?= 2

.PHONY: help setup quickstart test test-long mutants faults network slurm clean-root lint kill-preprocess \
	study study-smoke study-gpu bench-step-time bench-kernels bench-save-stall gpu kernel-resources clean

help:
	@echo "make setup        make .venv with pinned versions (does nothing when it is current)"
	@echo "make quickstart   build a corpus, train with and without reweighting, draw the report (CPU)"
	@echo "make study        which ways of reweighting help: 29 arms on 6 trunks (two hours on 2 cores)"
	@echo "make study-smoke  the same machinery in a minute; make study-gpu: 30 million parameters on a GPU"
	@echo "                  CORPUS=DIR chooses the text, train/DOMAIN.jsonl[.gz] and valid/DOMAIN.jsonl[.gz]"
	@echo "make test         run the tests, but for the long ones"
	@echo "make test-long    more layouts and faults of what make test tests, and sanitizers"
	@echo "make mutants      plant mistakes and see that tests fail (about seven minutes)"
	@echo "make faults       kill runs at random points and see that nothing is lost (about ten minutes)"
	@echo "make kill-preprocess  kill the data tool at random points and compare what it makes"
	@echo "make network      cut the link between two ranks, in network namespaces (root, three minutes)"
	@echo "make slurm        examples/slurm in a real SLURM on this machine (root, Debian, nine minutes)"
	@echo "make clean-root   the Dockerfile's cpu target in a clean Debian (root, 8 GB, 25 minutes)"
	@echo "make lint         ruff and mypy"
	@echo "make bench-step-time   step time by scope, after make quickstart"
	@echo "make bench-kernels     our kernels on this CPU against others"
	@echo "make bench-save-stall  how long a checkpoint stops training, async against sync"
	@echo "make kernel-resources  registers, spills and instructions of the CUDA kernels, without a GPU"
	@echo "make gpu          the kernels' tests and benchmarks on a GPU, with this machine's own python3"
	@echo "make clean        remove .venv and what the quick start made"
	@echo "PYTHON=/path/to/python chooses the interpreter that setup uses (3.12 or newer)."

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml tools/find_python.sh
	@python=$$(tools/find_python.sh) || exit 1; \
	 echo "setup: $$python -> $(VENV), about 5 GB and two minutes the first time"; \
	 "$$python" -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: setup
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not long"

test-long: setup
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile -m long

mutants: setup
	$(PY) tests/mutants.py

faults: setup
	OMP_NUM_THREADS=1 $(PY) -W ignore -m tests.faults.campaign

kill-preprocess: setup
	KILLS=36 $(PY) -m pytest -q tests/data/test_killed.py

network: setup
	$(PY) -W ignore -m tests.faults.network

slurm: setup
	$(PY) -W ignore -m tests.slurm.campaign

clean-root: setup
	$(PY) -m tests.docker.clean_root /var/tmp/megatron-rw-root

quickstart: setup
	$(PY) -m examples.quickstart.run

study: setup
	$(PY) -m examples.study.run --size cpu $(if $(CORPUS),--corpus $(CORPUS)) --output-dir study

study-smoke: setup
	$(PY) -m examples.study.run --size smoke $(if $(CORPUS),--corpus $(CORPUS)) --output-dir study-smoke

# On a bare machine, as below: its own python3 has this project installed, with the extra quickstart.
study-gpu:
	python3 -m examples.study.run --size gpu $(if $(CORPUS),--corpus $(CORPUS)) --output-dir study-gpu

bench-step-time: setup
	$(PY) benchmarks/step_time.py

bench-kernels: setup
	$(PY) benchmarks/kernels/compare.py logits --device cpu --rounds 31
	$(PY) benchmarks/kernels/compare.py layer --device cpu --rounds 21
	$(PY) benchmarks/kernels/compare.py weighting --device cpu

bench-save-stall: setup
	OMP_NUM_THREADS=1 $(PY) benchmarks/save_stall.py

kernel-resources: setup
	$(PY) -m tests.kernels.resources

# On a bare machine: no environment is made, as its torch knows its GPU. The wheel of Transformer
# Engine is not unpacked: without its libraries Megatron must not find it; peers.py reads it.
gpu:
	@site=$$(mktemp -d); trap 'rm -rf "$$site"' EXIT; \
	 find benchmarks/wheels -name '*.whl' ! -name 'transformer_engine-*' 2>/dev/null | xargs -r \
	   python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir -t "$$site"; \
	 PYTHONPATH="$$site:$$site/nvidia_cutlass_dsl/dsl_packages:$$PYTHONPATH" \
	   python3 benchmarks/gpu.py $(GPU_FLAGS)

clean:
	rm -rf $(VENV) quickstart study study-smoke
