# Two commands: `make demo` and `make test`. Both make .venv when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA machine gets Unsloth, and the CUDA build of PyTorch brings its own triton: the pin of it is for CPUs.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Unsloth's own dependencies pull a CUDA torchvision beside a CPU torch, so on a CPU it comes without them, for the
# contract tests alone.
UNSLOTH := unsloth==2026.10.7 unsloth_zoo==2026.10.7
MUTMUT := 3.8.1

.PHONY: demo test lint format docs mutants gpu nano traffic clean

demo: $(VENV)/.installed
	$(BIN)/fastprice demo

test: $(VENV)/.installed-dev lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src:kernels $(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything that a rented GPU can show in nine minutes, without network and without installing fastprice. Its tests
# first, at most a third of the time: that the kernels are right, then that training on them is, then all else. Then the
# headline, and every other stage.
GPU_OTHER := attention or checkpointing or graphs or unsloth
gpu:
	PYTHONPATH=src:kernels $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m fastprice.benchmarking --minutes 9 \
	  --tests "tests/gpu -m 'not slow' -k 'not (training or $(GPU_OTHER))'" \
	  --tests "tests/gpu -m 'not slow' -k training" \
	  --tests "tests/gpu -m 'not slow' -k '($(GPU_OTHER)) and not training'" \
	  --out benchmarks/results

# Launches and bytes of a decoder layer in training, counted without a GPU: none may rise, and the bars must hold.
traffic: $(VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/fastprice bench traffic --check

# The documentation as a site, in site/; a broken link or reference fails.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Changes the files that matter most (pyproject.toml, tool.mutmut), one spot at a time, and lists the changes that no test
# notices (docs/LOG.md). A run stops after MINUTES; the next one goes on where it stopped, until mutants/ is removed.
MINUTES ?= 25
mutants: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --constraint $(VENV)/.constraints mutmut==$(MUTMUT)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 timeout $(MINUTES)m $(BIN)/mutmut run --max-children 2 \
	  || test $$? -eq 124
	$(BIN)/mutmut results | sed "/: not checked/d"

# Remakes the shipped nano model on one CPU thread.
nano: $(VENV)/.installed
	$(BIN)/python scripts/make_nano.py --minutes 22 --out src/fastprice/nano

clean:
	rm -rf $(VENV) site mutants .pytest_cache .mypy_cache .ruff_cache fastprice-demo

$(VENV)/.constraints: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(GPU),grep -v '^triton==' constraints.txt,cat constraints.txt) > $@

# torch goes first, alone: later packages then keep the build that is there.
$(VENV)/.installed: $(VENV)/.constraints pyproject.toml
	$(BIN)/pip install --quiet --constraint $< torch
	$(BIN)/pip install --quiet --constraint $< --editable $(if $(GPU),'.[gpu]',.)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint $(VENV)/.constraints --editable '.[dev]'
	$(if $(GPU),,$(BIN)/pip install --quiet --no-deps $(UNSLOTH))
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint $(VENV)/.constraints --editable '.[docs]'
	touch $@
