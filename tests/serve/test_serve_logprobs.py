"""Bytes and offsets of tokens: exact for pieces of characters and for tokenizers with spaces of their own."""

import json

import pytest
from made_tokenizers import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from limbeck.engine.jobs import Drawn
from limbeck.serve.api.logprobs import LogProbsText
from limbeck.serve.vocabulary import Vocabulary


def sentencepiece_tokenizer():
    """As Llama 2 has it: a space in front of each word, the first one's dropped, unknown characters as bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁", "é"]
    backend = Tokenizer(
        models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def drawn(tokens):
    return [Drawn(token, -0.5, [(token, -0.5)]) for token in tokens]


def written(tokenizer, tokens, follows=False, is_chat=True):
    vocabulary = Vocabulary(tokenizer, ())
    log_probs = LogProbsText(vocabulary, vocabulary.hidden, follows)
    for one in drawn(tokens):
        log_probs.add([one], is_chat)
    return json.loads(log_probs.take())


def joined(found):
    return bytes(byte for entry in found["content"] for byte in entry["bytes"]).decode()


BYTES = byte_tokenizer(merges=["Ġ t", "Ġt h"])


@pytest.mark.parametrize("text", ["plain words", "🎉 and é, 日本", "\n\ttabs\u2028", "e\u0301"])
def test_bytes_of_byte_level_tokens_join_to_the_text(text):
    tokens = BYTES.encode(text, add_special_tokens=False)
    assert joined(written(BYTES, tokens)) == text


def test_pieces_of_a_character_have_names_of_their_own():
    tokens = BYTES.encode("🎉", add_special_tokens=False)
    content = written(BYTES, tokens)["content"]
    assert [entry["token"] for entry in content] == [f"bytes:\\x{byte:02x}" for byte in "🎉".encode()]
    assert content[0]["top_logprobs"][0]["bytes"] == [0xF0]


@pytest.mark.parametrize("tokenizer", [BYTES, sentencepiece_tokenizer()], ids=["bytes", "pieces"])
@pytest.mark.parametrize("text", ["the cats é🎉 the", "🎉🎉", "cats"])
def test_offsets_are_places_in_the_text(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found = written(tokenizer, tokens, is_chat=False)
    shown = tokenizer.decode(tokens)
    assert len(found["text_offset"]) == len(tokens)
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or shown.startswith(token, place)
    assert found["text_offset"] == sorted(found["text_offset"])


def test_hidden_tokens_have_no_characters():
    tokenizer = sentencepiece_tokenizer()
    the, cat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat"])
    found = written(tokenizer, [1, the, cat], is_chat=False)
    assert found["tokens"] == ["<s>", "the", " cat"] and found["text_offset"] == [0, 0, 3]


def test_the_first_space_belongs_to_a_text_that_goes_on():
    tokenizer = sentencepiece_tokenizer()
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert joined(written(tokenizer, [the, the])) == "the the"
    assert joined(written(tokenizer, [the, the], follows=True)) == " the the"


def test_what_was_taken_is_not_given_again():
    vocabulary = Vocabulary(BYTES, ())
    log_probs = LogProbsText(vocabulary, vocabulary.hidden, False)
    log_probs.add(drawn([5]), True)
    assert len(json.loads(log_probs.take())["content"]) == 1
    assert json.loads(log_probs.take()) == {"content": []}
    log_probs.add([], True)
    assert json.loads(log_probs.take()) == {"content": []}
