"""Run by the Python that has vLLM: scores requests that come as JSON lines, and tells the seconds of each.

    python _vllm_scoring.py DIRECTORY MAX_TOKENS < {"prefix": [id, ...], "items": [[id, ...], ...]} per line

Prints {"seconds": s} for each line; the first line of the output is {"ready": true}.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    engine = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=int(sys.argv[2]),
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        max_logprobs=10,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=10, detokenize=False)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": [*asked["prefix"], *item]} for item in asked["items"]]
        start = time.perf_counter()
        # The first item leaves the prefix in the cache; the others, asked at once, find it there.
        engine.generate(prompts[:1], sampling, use_tqdm=False)
        if prompts[1:]:
            engine.generate(prompts[1:], sampling, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
