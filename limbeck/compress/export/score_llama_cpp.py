"""Run in a process of its own: next-token log-probabilities of a GGUF file in llama.cpp, as JSON.

    python score_llama_cpp.py FILE < {"probes": [[id, ...], ...], "top": n, "texts": [text, ...]}

Prints {"scores": for each probe, for each position behind the first, {id: log-probability}, "tokens": ids of each
text}. A process, since llama.cpp ends the one that it is in when it meets a file it cannot read.
"""

import json
import sys
import urllib.request

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup = max(map(len, asked["probes"])) + 16, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    scores = [[_next(server, probe[:end], asked["top"]) for end in range(1, len(probe))] for probe in asked["probes"]]
    tokens = [_tokenize(server.listening_address, text) for text in asked["texts"]]
    print("\n" + json.dumps({"scores": scores, "tokens": tokens}))


def _next(server: xllamacpp.Server, prompt: list[int], top: int) -> dict[int, float]:
    # An end token, or half a character, is left out of the answer and its probabilities with it; so a printable
    # character is drawn. The probabilities are those before the draw.
    asked = {"prompt": prompt, "max_tokens": 1, "logprobs": top, "temperature": 0.0, "grammar": "root ::= [ -~]"}
    answer = server.handle_completions(asked)
    if "choices" not in answer:
        raise SystemExit(f"error: llama.cpp does not answer a prompt of {len(prompt)} tokens: {answer}")
    (position,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}


def _tokenize(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(address + "/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


if __name__ == "__main__":
    main()
