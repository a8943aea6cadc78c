"""A small model server for tests: the built-in teacher behind the answers of vLLM, SGLang, llama.cpp and a chat.

It runs in a thread on loopback. `faults` is a list of statuses (or None for a good answer) given out first.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from limbeck.models.load import load_model, load_tokenizer


class ModelServer:
    """Scores and writes with `tiny-teacher`; use it as a context manager."""

    def __init__(self, dialect: str = "vllm", faults: list[int | None] | None = None, retry_after: str | None = None):
        self.dialect, self.faults, self.retry_after = dialect, list(faults or []), retry_after
        self.model, self.tokenizer = load_model("tiny-teacher"), load_tokenizer("tiny-teacher")
        self.requests: list[tuple[str, Any]] = []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: Any) -> None:
                status, answer = outer.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429 and outer.retry_after:
                    self.send_header("Retry-After", outer.retry_after)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> ModelServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self.requests.append((path, body))
            fault = self.faults.pop(0) if self.faults else None
        try:
            if fault is not None:
                return fault, {"error": "a fault that the test asked for"}
            handler = self.handlers().get(path)
            return (404, {"detail": "Not Found"}) if handler is None else (200, handler(body))
        finally:
            with self.lock:
                self.under_way -= 1

    def handlers(self) -> dict[str, Any]:
        common = {
            "/v1/models": lambda _: {"object": "list", "data": [{"id": "tiny"}]},
            "/v1/chat/completions": self.chat,
        }
        common |= {"/tokenize": self.tokenize}
        own: dict[str, dict[str, Any]] = {
            "vllm": {"/version": lambda _: {"version": "0.11.0"}, "/v1/completions": self.vllm},
            "sglang": {"/get_model_info": lambda _: {"model_path": "tiny"}, "/generate": self.sglang},
            "llama_cpp": {"/props": lambda _: {"default_generation_settings": {}}, "/completion": self.llama_cpp},
        }
        return common | own[self.dialect]

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """[T V]: row t is what the model says after token t."""
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0].float(), -1)

    def vllm(self, body: Any) -> Any:
        tokens, count = body["prompt"], body["prompt_logprobs"]
        log_probs = self.log_probs(tokens)
        given: list[Any] = [None]
        for position in range(1, len(tokens)):
            row = log_probs[position - 1]
            order = row.argsort(descending=True).tolist()
            # vLLM names the prompt's own token first, whatever its rank, then the most likely ones.
            shown = dict.fromkeys([tokens[position], *order[:count]])
            given.append(
                {
                    str(token): {
                        "logprob": float(row[token]),
                        "rank": order.index(token) + 1,
                        "decoded_token": self.tokenizer.decode([token]),
                    }
                    for token in shown
                }
            )
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": given}
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}

    def sglang(self, body: Any) -> Any:
        tokens, start, count = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        log_probs = self.log_probs(tokens)
        one: list[Any] = [[None, tokens[start], None]]
        top: list[Any] = [None]
        for position in range(start + 1, len(tokens)):
            row = log_probs[position - 1]
            values, ids = row.topk(count)
            one.append([float(row[tokens[position]]), tokens[position], None])
            top.append([[v, i, None] for v, i in zip(values.tolist(), ids.tolist(), strict=True)])
        return {"text": "", "meta_info": {"input_token_logprobs": one, "input_top_logprobs": top}}

    def llama_cpp(self, body: Any) -> Any:
        values, ids = self.log_probs(body["prompt"])[-1].topk(body["n_probs"])
        top = [
            {"id": i, "token": "", "bytes": [], "logprob": v}
            for v, i in zip(values.tolist(), ids.tolist(), strict=True)
        ]
        return {"content": "", "completion_probabilities": [{**top[0], "top_logprobs": top}]}

    def tokenize(self, body: Any) -> Any:
        text = body["prompt"] if "prompt" in body else body["content"]
        return {"tokens": self.tokenizer.encode(text, add_special_tokens=False)}

    def chat(self, body: Any) -> Any:
        question = body["messages"][-1]["content"]
        message = {"role": "assistant", "content": f"seed {body['seed']}", "reasoning_content": f"about {question}"}
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
