"""Each command on a tiny random model of a family, in this process: `docs/models.md` is the table of what came of it.

What a command wrote is compared with plain transformers, eager and one sequence at a time: a loss, a divergence, the
tokens of a greedy text, log-probabilities. So `works` means that they were equal, not that nothing was raised.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from architectures import build
from made_tokenizers import byte_tokenizer
from tokenizers import pre_tokenizers

from limbeck.cli import main
from limbeck.engine import backends
from limbeck.models.load import load_model

SUMS = (("1+2", 1), ("3+40", 3), ("12+30", 9), ("5+5", 2), ("70+1", 14), ("9+9", 5), ("2+2", 20), ("61+3", 7))
"""What is asked, and how often the thought says it: sequences from 20 to 130 tokens."""
TOKENIZER = byte_tokenizer()
TOKENIZER.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})  # Qwen2's tokenizer would add it
LOSS_TOLERANCE = 1e-5
"""Largest relative difference of a loss."""


class Cell(NamedTuple):
    """What came of a command."""

    state: str
    """works, slower, refused or WRONG."""
    reason: str = ""


class Place(NamedTuple):
    """The files of one family."""

    root: Path
    model: Path
    traces: Path
    problems: Path
    student: Path
    """A Llama model, which learns from the family's."""


def prepare(name: str, root: Path) -> Place:
    """Write the model of a family and what the commands read."""
    place = Place(root, root / "model", root / "traces.jsonl", root / "problems.jsonl", root / "student")
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZER
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for path, family, seed in ((place.model, name, 0), (place.student, "Llama", 5)):
        build(family, len(TOKENIZER), seed, **tokens).save_pretrained(path)
        tokenizer.save_pretrained(path)
    sums = [(f"{text}=", reply_of(text, times), str(sum(map(int, text.split("+"))))) for text, times in SUMS]
    write_lines(
        place.traces,
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": r}]} for q, r, _ in sums],
    )
    write_lines(place.problems, [{"problem": question, "answer": answer} for question, _, answer in sums[:3]])
    return place


def reply_of(text: str, times: int) -> str:
    """A thought that repeats itself, and an answer."""
    return "<think>\n" + f"{text}\n" * times + f"</think>\n\n{sum(map(int, text.split('+')))}"


def write_lines(path: Path, rows: list[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(*arguments: object) -> tuple[int, str]:
    """A command's exit code and what it printed; an exception is a stack trace on somebody's console."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception as error:
            return -1, f"{type(error).__name__}: {error}"
    return code, printed.getvalue()


def last_line(text: str) -> str:
    """The refusal of a command on one line, without the places of a single run."""
    told = " ".join(text.split())
    return told.rpartition("limbeck: ")[2]


def trial(name: str, command: str, place: Place) -> Cell:
    """Run a command on a family's model and compare."""
    for name_of_output in ("out", "out.partial"):
        shutil.rmtree(place.root / name_of_output, ignore_errors=True)
    backends._tell.cache_clear()
    return TRIALS[command](place)


def _refused_or(place: Place, code: int, text: str, difference: Callable[[], float], limit: float) -> Cell:
    if code == 2 and "Traceback" not in text:
        return Cell("refused", _anonymous(last_line(text), place))
    if code == 1 and "not clean" in text:
        return Cell("refused", "written, but its certificate is not clean")
    if code != 0:
        return Cell("WRONG", f"exit code {code}: {_anonymous(last_line(text), place)}")
    gap = difference()
    if not gap <= limit:
        return Cell("WRONG", f"off by {gap:.2g}")
    slower = [line for line in text.split("note: ") if "slower" in line or "engine: " in line]
    return Cell("slower", _how(slower[0])) if slower else Cell("works")


def _how(line: str) -> str:
    told = " ".join(line.split())
    for mark, how in (
        ("padded in groups", "padded"),
        ("one at a time", "one at a time"),
        ("own forward", "plain forward"),
    ):
        if mark in told:
            return how
    return told


def _anonymous(text: str, place: Place) -> str:
    for path in (place.model, place.root):
        text = text.replace(f"{path}: ", "").replace(str(path), "DIR")
    return text


def own_model(path: Path) -> Any:
    """Plain transformers, eager, float32."""
    config = transformers.AutoConfig.from_pretrained(path)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    raise AssertionError(config.model_type)


def sequences() -> list[tuple[torch.Tensor, int]]:
    """Token ids of each trace, and where its response begins."""
    tokenizer = TOKENIZER
    found = []
    for text, times in SUMS:
        asked = [{"role": "user", "content": f"{text}="}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + reply_of(text, times) + "<|im_end|>", add_special_tokens=False)["input_ids"]
        found.append((torch.tensor(ids), start))
    return found


@torch.no_grad()
def own_log_probs(path: Path, rows: list[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    """[n V] before each token of the responses."""
    model = own_model(path)
    return [model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1) for ids, start in rows]


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def _first_step(out: Path) -> dict[str, float]:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


ONE_STEP = ("--num-validation", 0, "--training.batch-size", 8, "--max-steps", 1)


def _distill(place: Place) -> Cell:
    out = place.root / "out"
    code, text = call(
        "distill", "--student.model", place.model, "--traces.source", place.traces, *ONE_STEP, "--out", out
    )

    def difference() -> float:
        rows = sequences()
        parts = [
            -p.gather(1, ids[start:, None])
            for p, (ids, start) in zip(own_log_probs(place.model, rows), rows, strict=True)
        ]
        return _relative(_first_step(out)["ce_term"], float(torch.cat(parts).mean()))

    return _refused_or(place, code, text, difference, LOSS_TOLERANCE)


def _cache(place: Place) -> Cell:
    out, student = place.root / "out", place.root / "learned"
    code, text = call(
        "teacher", "cache", "--teacher", place.model, "--source", place.traces, "--mode", "hidden", "--out", out
    )
    if code == 0:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(student)
        options = ("--teacher.cache", out, "--traces.source", place.traces, "--kd-ratio", 1.0)
        code, told = call("distill", "--student.model", place.student, *options, *ONE_STEP, "--out", student)
        text = text if code == 0 else told

    def difference() -> float:
        rows = sequences()
        pairs = zip(own_log_probs(place.student, rows), own_log_probs(place.model, rows), strict=True)
        kd = torch.cat([(theirs.exp() * (theirs - own)).sum(-1) for own, theirs in pairs]).mean()
        return _relative(_first_step(student)["kd_term"], float(kd))

    return _refused_or(place, code, text, difference, LOSS_TOLERANCE)


def greedy(path: Path, prompt: list[int], tokens: int) -> list[int]:
    """What plain transformers writes, without any cache."""
    model, ids = own_model(path), list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == TOKENIZER.eos_token_id:
                break
    return ids[len(prompt) :]


def _prompts() -> list[list[int]]:
    return [ids[:start].tolist() for ids, start in sequences()[:3]]


def _expected_texts(path: Path) -> list[str]:
    return [_plain(TOKENIZER.decode(greedy(path, prompt, 6))) for prompt in _prompts()]


def _plain(text: str) -> str:
    """Without special tokens, which servers leave out and evaluation keeps."""
    for token in TOKENIZER.all_special_tokens:
        text = text.replace(token, "")
    return text


def _evaluate(place: Place) -> Cell:
    out = place.root / "out"
    options = ("--problems.source", place.problems, "--max-new-tokens", 6)
    code, text = call("evaluate", "--model", place.model, *options, "--out", out)

    def difference() -> float:
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        return float([_plain(row["outputs"][0]) for row in rows] != _expected_texts(place.model))

    return _refused_or(place, code, text, difference, 0)


CALIBRATION = ("--calibration.sequences", 4, "--calibration.sequence-length-tokens", 64, "--gate.sequences", 2)


def _prune(place: Place) -> Cell:
    """What is written computes in plain transformers what limbeck reads; how near its source, the command tells."""
    out = place.root / "out"
    options = ("--neuron-sparsity", 0.25, "--calibration.traces.source", place.traces, *CALIBRATION)
    code, text = call("prune", "--model", place.model, *options, "--out", out)

    def difference() -> float:
        ids, start = sequences()[0]
        with torch.no_grad():
            found = load_model(str(out))(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        return float((found - own_log_probs(out, [(ids, start)])[0]).abs().max())

    return _refused_or(place, code, text, difference, 1e-4)


def _quantize(place: Place) -> Cell:
    """Eight bits a row are within a hundredth of a nat of the source."""
    out = place.root / "out"
    options = ("--scheme", "w8a16", "--group-size", "null", "--calibration.traces.source", place.traces, *CALIBRATION)
    code, text = call("quantize", "--model", place.model, *options, "--out", out)

    def difference() -> float:
        ids, start = sequences()[0]
        with torch.no_grad():
            found = load_model(str(out))(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        source = own_log_probs(place.model, [(ids, start)])[0]
        return float((source.exp() * (source - found)).sum(-1).mean())

    return _refused_or(place, code, text, difference, 0.01)


def _dense(place: Place) -> Cell:
    out = place.root / "out"
    code, text = call("export", "--format", "dense", "--model", place.model, "--out", out)

    def difference() -> float:
        rows = sequences()
        pairs = zip(own_log_probs(out, rows), own_log_probs(place.model, rows), strict=True)
        return max(float((new - old).abs().max()) for new, old in pairs)

    return _refused_or(place, code, text, difference, 1e-4)


def _gguf(place: Place) -> Cell:
    out = place.root / "out"
    code, text = call("export", "--format", "gguf", "--gguf-type", "f16", "--model", place.model, "--out", out)
    return _refused_or(place, code, text, lambda: 0.0, 0)


def _serve(place: Place) -> Cell:
    from limbeck_server import RunningServer

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            server = RunningServer(str(place.model))
            with server:
                answers = [
                    server.post("/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0}).json()
                    for prompt in _prompts()
                ]
    except (ValueError, OSError) as error:
        return _refused_or(place, 2, f"limbeck: {error}", lambda: 0.0, 0)
    except Exception as error:
        return Cell("WRONG", f"{type(error).__name__}: {error}")
    texts = [answer["choices"][0]["text"] if "choices" in answer else json.dumps(answer) for answer in answers]
    expected = _expected_texts(place.model)
    return _refused_or(place, 0, printed.getvalue(), lambda: float([_plain(text) for text in texts] != expected), 0)


TRIALS: dict[str, Callable[[Place], Cell]] = {
    "distill": _distill,
    "teacher cache": _cache,
    "evaluate": _evaluate,
    "prune": _prune,
    "quantize": _quantize,
    "export dense": _dense,
    "export gguf": _gguf,
    "serve": _serve,
}
