"""Run by the Python that has vLLM: next-token log-probabilities of a checkpoint, as JSON.

    python score_vllm.py DIRECTORY < {"probes": [[id, ...], ...], "top": n}

Prints {"scores": for each probe, for each position behind the first, {id: log-probability}}.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    asked = json.load(sys.stdin)
    engine = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=max(map(len, asked["probes"])) + 8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_logprobs=asked["top"],
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=asked["top"], detokenize=False)
    answers = engine.generate([{"prompt_token_ids": probe} for probe in asked["probes"]], sampling)
    scores = [
        [{token: found.logprob for token, found in position.items()} for position in answer.prompt_logprobs[1:]]
        for answer in answers
    ]
    print("\n" + json.dumps({"scores": scores}))


if __name__ == "__main__":
    main()
