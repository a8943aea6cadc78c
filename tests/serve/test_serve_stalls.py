"""What one request makes the server do keeps nobody else from the event loop."""

import asyncio
import json
import time

import httpx
import pytest
from limbeck_server import RunningServer
from made_tokenizers import CHATML
from written_models import save_exportable

from limbeck.serve.api.shapes import as_json
from limbeck.serve.api.tokens import Text, Tokens
from limbeck.serve.api.tools import HARMONY_FORM, ToolSplitter
from limbeck.serve.forms import SOURCE_CHARACTERS
from limbeck.serve.text import StopStrings

MOST_SECONDS = 0.1
"""That the loop may be held. /health needs the loop alone."""
BEAT_SECONDS = 0.002
TRIES = 4
"""The best one counts, since the machine may be busy with other things; what holds the loop does so every time."""

MESSAGES = [{"role": "user", "content": "a"}]
WIDE = {f"k{number}": 0 for number in range(100_000)}
REQUESTS = {
    "ids to text": ("/detokenize", {"tokens": [65, 66] * 250_000}, 200, '"prompt":"'),
    "a wide field that is not done": ("/v1/completions", {"prompt": "a", "logit_bias": WIDE}, 422, "logit_bias"),
    "a field that nobody knows": ("/v1/completions", {"prompt": "a", "max_tokens": 1, "x": WIDE}, 200, "length"),
    "a long label": ("/v1/score", {"query": "a", "items": "b", "labels": ["x " * 2_000_000]}, 400, "labels"),
    "label after label": ("/v1/score", {"query": "a", "items": "b", "labels": ["xy" * 2000] * 999}, 422, "'xyxy"),
    "labels that are none": ("/v1/score", {"query": "a", "items": "b", "labels": [0] * 290_000}, 422, "labels.0"),
    "forms that are none": ("/v1/completions", {"prompt": "a", "structured_outputs": WIDE}, 422, "'k0' is none of"),
    "choices that are none": ("/v1/completions", {"structured_outputs": {"choice": [0] * 290_000}}, 422, "choice.0"),
    "a wide schema": ("/v1/completions", {"structured_outputs": {"json": {"enum": list(WIDE)}}}, 422, "characters"),
    "a deep schema as text": ("/v1/completions", {"structured_outputs": {"json": "[" * 200_000}}, 422, "give a schema"),
    "a long schema as text": (
        "/v1/completions",
        {"structured_outputs": {"json": json.dumps({"properties": WIDE})}},
        422,
        f"at most {SOURCE_CHARACTERS}",
    ),
    "ids that are echoed": ("/v1/completions", {"prompt": [[65] * 1900] * 128, "echo": True, "max_tokens": 0}, 200, ""),
    "a query behind each item": (
        "/v1/score",
        {"query": [65] * 200_000, "items": [[66]] * 1000, "item_first": True, "label_token_ids": [67]},
        422,
        "with the query behind each item",
    ),
    "many labels": (
        "/v1/score",
        {"query": "a", "items": ["b"] * 1000, "label_token_ids": list(range(250)), "apply_softmax": True},
        200,
        "",
    ),
    "turns that are none": ("/v1/responses", {"input": [{}] * 190_000}, 422, "10000"),
    "messages that are none": ("/v1/chat/completions", {"messages": MESSAGES * 90_000}, 422, "10000"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_exportable(directory, max_position_embeddings=2048)
    (directory / "chat_template.jinja").write_text(CHATML)
    with RunningServer(str(directory), name="m") as running:
        yield running


async def beat_until(done):
    """The longest time that another step of the loop kept this one waiting."""
    slowest = 0.0
    while not done.is_set():
        start = time.monotonic()
        await asyncio.sleep(BEAT_SECONDS)
        slowest = max(slowest, time.monotonic() - start - BEAT_SECONDS)
    return slowest


@pytest.mark.parametrize("name", REQUESTS)
def test_the_loop_is_free_meanwhile(server, name):
    path, body, status, told = REQUESTS[name]
    content, loop = json.dumps(body).encode(), server.service.worker._loop
    slowest = []
    while len(slowest) < TRIES and min(slowest, default=1.0) > MOST_SECONDS:
        done = asyncio.Event()
        found = asyncio.run_coroutine_threadsafe(beat_until(done), loop)
        answer = httpx.post(
            server.url + path, content=content, headers={"content-type": "application/json"}, timeout=60
        )
        loop.call_soon_threadsafe(done.set)
        slowest.append(found.result())
        assert answer.status_code == status and told in answer.text, answer.text[:300]
    assert min(slowest) < MOST_SECONDS, slowest


def test_long_ids_are_decoded_as_short_ones_are(server):
    vocabulary = server.service.vocabulary
    ids = list(range(250)) * 20
    whole = server.service.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert vocabulary.decode(ids) == whole and vocabulary.decode(ids[:50]) == whole[: len(vocabulary.decode(ids[:50]))]
    answer = server.post("/detokenize", {"tokens": ids}).json()
    assert answer == {"prompt": whole}


def test_json_in_pieces_is_json():
    tree = {"a": list(range(10_000)), "b": [[0.5, 1e-30], []], "c": 'é\u2028"', "d": [{"e": None, "f": True}], "g": []}
    assert json.loads(as_json(tree)) == tree
    assert as_json(Text(prompt="ü")) == Text(prompt="ü").model_dump_json()
    some = Tokens(count=1, max_model_len=2, tokens=[1])
    assert json.loads(as_json(some)) == json.loads(some.model_dump_json(exclude_none=True))


def test_long_stop_strings_are_looked_for_in_little_time():
    """Ones that the text begins again and again, and ones that it never goes on with."""
    stops = ["a" * 999 + "b", *("ab" * 499 + chr(200 + number) for number in range(15))]
    text, start = StopStrings(stops), time.monotonic()
    told = "".join(text.add("a") for _ in range(3000)) + text.add("b")
    assert time.monotonic() - start < 2.0
    assert text.found == stops[0] and told == "a" * 2001


@pytest.mark.parametrize("filling", ["to=", "to=a", "a", "\n", "<"])
def test_calls_that_never_end_are_read_in_little_time(filling):
    splitter, start = ToolSplitter(HARMONY_FORM), time.monotonic()
    written = "<|channel|>commentary to=" + filling * 6000
    shown = "".join(splitter.add(written[place : place + 4])[0] for place in range(0, len(written), 4))
    assert (shown + splitter.finish()[0], splitter.count) == (written, 0)
    assert time.monotonic() - start < 3.0
