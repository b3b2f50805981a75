# luthier: every command a developer or a newcomer types. Each sets up what it needs in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export LUTHIER_DEMO_BEGAN := $(shell date +%s)

.PHONY: help setup demo demo-openai check test quick test-long test-postgres test-clients test-lm-eval test-vllm test-llamacpp bench bench-serve bench-quick bench-peers clean
help:            ## list these commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 18

setup: $(STAMP)  ## make .venv with everything pinned in constraints.txt

# torch first and alone: this version has a small CPU build; a newer one would bring gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev,postgres]' -c constraints.txt
	touch $@

demo: $(STAMP)   ## train, gate, promote, serve and roll back the prompt-injection guard
	$(BIN)/python examples/demo.py

demo-openai: $(STAMP) ## the official OpenAI client fine-tunes SmolLM2 against a server of its own
	$(BIN)/python examples/served.py examples/openai_client.py

check: $(STAMP)  ## what one runs all day: lint, types, import rules, house tests (seconds)
	$(BIN)/ruff check src tests examples bench
	$(BIN)/ruff format --check src tests examples bench
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/house

test: check      ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/house --numprocesses 2 --dist loadscope

quick: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest tests -m 'not slow and not long' -x

test-long: $(STAMP) ## what takes too long for every day: 200 kills of one training
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m long

test-postgres: $(STAMP) ## the store's tests on a real PostgreSQL 15, started on loopback
	$(BIN)/python -m tests.postgres -- $(BIN)/python -m pytest tests/test_store.py tests/faults/test_store_faults.py tests/jobs/test_queue.py

test-vllm: $(STAMP) bench/peers/.venvs/vllm/.ready ## the backends' contract on a real vLLM (its CPU build, float32, in its own environment)
	LUTHIER_TEST_VLLM=$(CURDIR)/bench/peers/.venvs/vllm/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/contract/test_backends.py

test-llamacpp: $(STAMP) bench/peers/.venvs/llamacpp/.ready ## the same on a real llama.cpp (xllamacpp, merged GGUF, in its own environment)
	LUTHIER_TEST_LLAMACPP=$(CURDIR)/bench/peers/.venvs/llamacpp/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/contract/test_backends.py

CLIENTS := tests/clients/.venv
THROUGH := $(BIN)/python examples/served.py -c 'import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))'
test-clients: $(STAMP) $(CLIENTS)/.ready ## LiteLLM and LangChain chat with SmolLM2, in an environment of their own
	LITELLM_LOCAL_MODEL_COST_MAP=True $(THROUGH) $(CLIENTS)/bin/python tests/clients/chat.py

$(CLIENTS)/.ready: tests/clients/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -r $<
	touch $@

LM_EVAL := bench/peers/.venvs/lm-eval
BASE ?= $(firstword $(wildcard $(HOME)/.luthier/artifacts/*/base))
test-lm-eval: $(STAMP) $(LM_EVAL)/.ready ## lm-evaluation-harness scores BASE over HTTP as it does in process
	HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 $(LM_EVAL)/bin/python bench/lm_eval_parity.py $(BASE) $(BIN)/luthier $(RESULTS)/$(NAME)-lm-eval.json

$(LM_EVAL)/.ready: bench/lm_eval/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $$(grep '^torch==' $<)
	$(@D)/bin/pip install --quiet -r $<
	touch $@

NAME ?= $(shell date +%F)
PEERS := bench/peers/.venvs
RESULTS := bench/results
bench: $(STAMP) bench-peers ## speed, memory and loss against the rivals (hours; bench/README.md)
	$(BIN)/python bench/workloads.py bench/.rows
	$(BIN)/python bench/exact_trl.py bench/.rows $(RESULTS)/$(NAME)-exact.json
	$(BIN)/python bench/run.py bench/.rows $(RESULTS)/$(NAME)-speed.json
	$(BIN)/python bench/run.py bench/.rows $(RESULTS)/$(NAME)-ablations.json --systems ablations --workloads chat,equal
	$(BIN)/python bench/run.py bench/.rows $(RESULTS)/$(NAME)-loss.json --workloads chat --rounds 1 --steps 40 --looks 5
	$(BIN)/python bench/step.py bench/.rows $(RESULTS)/$(NAME)-step.json

SERVERS := $(PEERS)/vllm/.ready $(PEERS)/llamacpp/.ready
bench-serve: $(STAMP) $(SERVERS) ## answers a second, beside vLLM, llama.cpp and plain PEFT (an hour; bench/README.md)
	$(BIN)/python bench/workloads.py bench/.rows
	$(BIN)/python bench/serving/made.py bench/.serving --rows bench/.rows
	$(BIN)/python bench/serve.py bench/.serving $(RESULTS)/$(NAME)-serving.json

bench-quick: $(STAMP) bench-peers ## the same in minutes, to see that every system runs
	$(BIN)/python bench/workloads.py bench/.rows
	$(BIN)/python bench/run.py bench/.rows bench/.rows/quick.json --workloads guard --rounds 1 --steps 3 --warmup 1

bench-peers: $(PEERS)/trl/.ready $(PEERS)/llamafactory/.ready $(PEERS)/unsloth/.ready ## the rivals' own environments

# torch first and alone here too, and pinned beside every rival, so that all of them run the same one.
# torchvision and torchaudio come built for CUDA and do not load beside a CPU torch. Text needs neither, but
# LLaMA-Factory imports torchaudio, which does without its compiled part if that is not there.
$(PEERS)/%/.ready: bench/peers/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $$(grep '^torch==' $<)
	$(@D)/bin/pip install --quiet -r $<
	$(@D)/bin/pip uninstall --quiet --yes torchvision
	rm -f $(@D)/lib/python3*/site-packages/torchaudio/lib/*.so
	touch $@

# vLLM does without all three; each of them, present, keeps it from starting on a CPU.
$(PEERS)/vllm/.ready: bench/peers/vllm.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $$(grep '^torch==' $<)
	$(@D)/bin/pip install --quiet -r $<
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:           ## remove what setup and tests made; the home folder stays
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
