"""Constrained texts of random models are valid, whatever the schema."""

import functools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import made_model
from made_tokenizers import byte_tokenizer

from limbeck.engine.decoder import Decoder
from limbeck.engine.generation import Generator
from limbeck.engine.jobs import Job, ThoughtBudget
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.sampling import Sampling
from limbeck.engine.weights import weights_of
from limbeck.errors import ConfigError

pytest.importorskip("llguidance")
from limbeck.engine import constraints
from limbeck.engine.constraints import Grammars
from limbeck.engine.form_trial import attempt

TOKENIZER = byte_tokenizer(merges=['" :', '{ "', '" }', "t r", "1 2"])
END = frozenset([TOKENIZER.eos_token_id])
VOCABULARY = len(TOKENIZER) + 5
"""Some rows of the head stand for nothing, as in many models."""


@functools.cache
def grammars():
    return Grammars(TOKENIZER, VOCABULARY)


def constraint_of(form):
    """A text of its own at the start of a form."""
    return grammars().text(form, END)


@functools.cache
def decoder():
    return Decoder(weights_of(made_model("llama", vocab_size=VOCABULARY, max_position_embeddings=2048)))


def text_of(constraint, seed, thought=None):
    """The text behind its end tokens, and how it ended."""
    generator = Generator(decoder(), PrefixCache(0, 64, "model"))
    sampling = Sampling(seed=seed, temperature=1.5)
    generator.add(
        Job(prompt=[5], max_tokens=1500, sampling=sampling, end_tokens=END, constraint=constraint, thought=thought)
    )
    tokens, finish = [], None
    while generator.running:
        for progress in generator.step():
            tokens += [drawn.token for drawn in progress.tokens]
            finish = progress.finish
    return tokens, finish


def decoded(tokens):
    return TOKENIZER.decode([token for token in tokens if token not in END], clean_up_tokenization_spaces=False)


NAMES = st.text("abcXYZ_é ", min_size=1, max_size=5)
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-99, 99),
        st.integers(0, 9),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
    st.builds(lambda names: {"enum": names}, st.lists(NAMES, min_size=1, max_size=3, unique=True)),
)


def objects(parts):
    def build(properties, optional):
        required = [name for name in properties if name not in optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(NAMES, parts, max_size=3), st.sets(NAMES, max_size=2))


def arrays(parts):
    return st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, parts, st.integers(0, 2))


SCHEMAS = st.recursive(LEAVES, lambda parts: st.one_of(objects(parts), arrays(parts)), max_leaves=5)


def is_valid(value, schema):
    """The part of JSON Schema that SCHEMAS uses."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        names_fit = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(known)
        return names_fit and all(is_valid(part, known[name]) for name, part in value.items())
    if kind == "array":
        fits = isinstance(value, list) and len(value) <= schema["maxItems"]
        return fits and all(is_valid(part, schema["items"]) for part in value)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


@settings(max_examples=40, deadline=None)
@given(SCHEMAS, st.integers(0, 99))
def test_json_is_valid_under_its_schema(schema, seed):
    tokens, finish = text_of(constraint_of(constraints.json_schema(schema)), seed)
    assert finish == "stop"
    assert is_valid(json.loads(decoded(tokens)), schema)


@pytest.mark.parametrize("seed", range(3))
def test_strings_of_other_forms(seed):
    options = ["yes", 'no "way"', "ναί", "a.b|(c)*\\", "two\nlines", *(f"label {n}" for n in range(2500))]
    assert decoded(text_of(constraint_of(constraints.choice(options)), seed)[0]) in options
    form = constraints.regex(r"[a-c]{2,5}\.\d?")
    assert re.fullmatch(form.source, decoded(text_of(constraint_of(form), seed)[0]))


def test_json_behind_a_thought():
    """The thought is free; behind the forced marker the schema holds."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    close = TOKENIZER.encode("</t>", add_special_tokens=False)
    tokens, finish = text_of(constraint_of(constraints.json_schema(schema)), 3, ThoughtBudget(12, (), close))
    assert tokens[12 : 12 + len(close)] == close and finish == "stop"
    assert is_valid(json.loads(decoded(tokens[12 + len(close) :])), schema)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (constraints.json_schema({"type": "list"}), "Invalid type: list"),
        (constraints.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (constraints.json_schema({"$ref": "#"}), "NoExtension|no text"),
        (constraints.json_schema({"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}), "NoExtension|no text"),
        (constraints.json_schema({"allOf": [{"type": "string"}, {"type": "null"}]}), ""),
        (constraints.regex("("), "unclosed group"),
    ],
)
def test_what_has_no_text_says_why(form, message):
    answer = attempt(grammars()._tokenizer, {"id": 1, **form._asdict()})
    assert re.search(message, answer["error"]) and "\n" not in answer["error"] and len(answer["error"]) <= 500


def test_what_is_no_form_is_refused():
    with pytest.raises(ConfigError, match="false has no text"):
        constraints.json_schema(False)
    with pytest.raises(ConfigError, match="choice: give one option"):
        constraints.choice(["a", ""])


class BrokenMatcher:
    """Goes into error where it is told to, as llguidance's does at one of its limits."""

    def __init__(self, at, dead_end=False):
        self._left, self._dead_end = at, dead_end

    def compute_bitmask(self):
        return bytes(100) if self._dead_end and self._left == 0 else b"\xff" * 100

    def is_error(self):
        return not self._dead_end and self._left == 0

    def get_error(self):
        return "too many states\n<state>\nall of them"

    def is_accepting(self):
        return False

    def is_stopped(self):
        return False

    def consume_token(self, token):
        self._left -= 1
        return True


@pytest.mark.parametrize("dead_end", [False, True])
def test_a_form_that_fails_ends_its_own_text_alone(dead_end):
    generator = Generator(decoder(), PrefixCache(0, 64, "model"))
    broken = constraints.GrammarConstraint(lambda: BrokenMatcher(3, dead_end), VOCABULARY, END)
    bad = generator.add(Job(prompt=[5], max_tokens=50, sampling=Sampling(seed=1), constraint=broken))
    good = generator.add(Job(prompt=[5], max_tokens=20, sampling=Sampling(seed=1)))
    tokens, finish = {bad: 0, good: 0}, {}
    while generator.running:
        for progress in generator.step():
            tokens[progress.job] += len(progress.tokens)
            finish[progress.job] = progress.finish
    assert broken.problem == ("no token of the vocabulary goes on with the form" if dead_end else "too many states")
    assert tokens == {bad: 4, good: 20} and finish[good] == "length"
