"""What a teacher with another tokenizer reads in place of the student's sequences.

The teacher gets its own prompt, the messages in its own template, as it was trained to read them; behind it the very
text that the student reads as its response, markers included, in its own tokens, and its own end of turn. So the two
agree in every byte of the response but for the end, which both call by one name (`spelling.END`); what the prompt says
is not compared. Where a tokenizer changes a text (a normaliser, a broken character), its bytes agree up to that place,
and the student's tokens behind it have no targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from limbeck.config import config_hash
from limbeck.cost.shapes import config_of
from limbeck.errors import PairError
from limbeck.models.load import load_tokenizer, stated_ends
from limbeck.teacher.alignment import Spans, align, num_shared_bytes
from limbeck.teacher.shard import Stored
from limbeck.teacher.spelling import Spelling, tokenizer_hash
from limbeck.teacher.vocabulary_map import Passage, VocabularyMap
from limbeck.traces.encoding import encode_parts
from limbeck.traces.render import RenderConfig, bare_header, stop_ids, turn_end
from limbeck.traces.sample import PROMPT, Sample
from limbeck.traces.trace import Trace


class Reading(NamedTuple):
    """A sequence of the teacher's tokens, and where the student's tokens lie in it."""

    ids: np.ndarray
    """int32 [U], of the teacher."""
    spans: Spans
    """For each of the student's T tokens the places in `ids`."""

    def positions(self, asked: np.ndarray) -> np.ndarray:
        """bool [U]: the teacher's tokens whose distributions tell of the student's tokens `asked`, bool [T]."""
        found = np.zeros(len(self.ids), bool)
        for first, last in zip(self.spans.first[asked], self.spans.last[asked], strict=True):
            if first >= 0:
                found[first : last + 1] = True
        return found

    def passage(self, place: int, target: int) -> Passage | None:
        """Where the student's token `target` stands that is at `place`; None where the teacher reads other text."""
        first, last, skipped = (int(part[place]) for part in self.spans)
        return None if first < 0 else Passage(self.ids[first : last + 1].tolist(), skipped, target)


class Translation(NamedTuple):
    """All that a teacher needs to know of a student with another tokenizer."""

    vocabularies: VocabularyMap
    readings: dict[bytes, Reading]
    """By `key_of` the student's tokens."""
    tokenizer: str
    """`tokenizer_hash` of the student's."""
    read_as: str
    """A hash of how the teacher writes what it reads."""

    def of(self, members: Sequence[Stored]) -> list[Reading]:
        """The readings of some sequences."""
        return [self.readings[key_of(member.ids)] for member in members]

    def read_for(self, members: Sequence[Stored]) -> list[Stored]:
        """The teacher's sequences in place of some, and its positions that are asked for."""
        read = zip(self.of(members), members, strict=True)
        return [Stored(reading.ids, reading.positions(member.positions)) for reading, member in read]


def key_of(ids: np.ndarray) -> bytes:
    """Names a sequence of tokens."""
    return ids.astype(">u4").tobytes()


class Reader:
    """Writes what a student's sequences say for a teacher."""

    def __init__(self, teacher: str, student: str, config: RenderConfig) -> None:
        """Args: names of the models, and how the student renders; a teacher without a template takes the student's."""
        self._tokenizer = load_tokenizer(teacher)
        self._config = replace(config, chat_template=None) if self._tokenizer.chat_template else config
        self.teacher = spelling_of(teacher, self._tokenizer, self._config)
        self.student = spelling_of(student, load_tokenizer(student), config)
        self._end = turn_end(self._tokenizer, self._config)
        given = self._config.chat_template
        template = self._tokenizer.chat_template if given is None else given.read_text(encoding="utf-8")
        self.read_as = config_hash({"template": template, "markers": [config.start_marker, config.end_marker]})

    def read(self, sample: Sample, messages: Sequence[Mapping[str, str]]) -> Reading:
        """What the teacher reads in place of a sample, which may be cut; `messages` are its prompt.

        Raises: TemplateError where the teacher's template refuses the messages.
        """
        start = int(np.argmax(sample.segment_ids != PROMPT))
        ids = sample.input_ids[start:].tolist()
        is_ended = bool(ids) and ids[-1] in self.student.ends
        body = self.student.spell(ids[:-1] if is_ended else ids).decode(errors="ignore")
        header = bare_header(messages, self._tokenizer, self._config)
        encoded, num_header = encode_parts(header, body + self._end * is_ended, self._tokenizer)
        theirs = encoded.input_ids[num_header:].tolist()
        shared = num_shared_bytes(self.student.spell(ids), self.teacher.spell(theirs))
        spans = align(_lengths(self.student, ids), _lengths(self.teacher, theirs), shared)
        has_span = spans.first >= 0
        places = (np.where(has_span, part + num_header, -1) for part in (spans.first, spans.last))
        parts = (np.concatenate([np.full(start, -1), part]).astype(np.int32) for part in (*places, spans.skipped))
        return Reading(encoded.input_ids, Spans(*parts))


def spelling_of(name: str, tokenizer: Any, config: RenderConfig) -> Spelling:
    """What the tokens of a model spell; its end tokens are those of its template, tokenizer, config and generation."""
    usual = tokenizer.encode(turn_end(tokenizer, config), add_special_tokens=False)[-1]
    ends = [usual, *stop_ids(tokenizer, config), *sorted(stated_ends(name, config_of(name)))]
    return Spelling(tokenizer, ends, (config.start_marker, config.end_marker))


def translate(
    teacher: str,
    student: str,
    samples: Sequence[Sample],
    asked: Sequence[Stored],
    traces: Sequence[Trace],
    config: RenderConfig,
) -> Translation:
    """What the teacher reads in place of all samples, and how often the student begins which token there.

    Args:
      teacher, student: names of the models.
      samples: in the student's tokens, as they are cut.
      asked: the same sequences with the positions that are wanted.
      traces: where the samples come from.
      config: how the student renders.
    Raises: PairError for a sample of which the teacher reads nothing; what the teacher's template raises.
    """
    reader, messages = Reader(teacher, student, config), {trace.key: trace.messages for trace in traces}
    vocabularies, readings = VocabularyMap(reader.teacher, reader.student), {}
    for sample, (ids, positions, *_) in zip(samples, asked, strict=True):
        if key_of(ids) in readings:
            continue
        reading = readings[key_of(ids)] = reader.read(sample, messages[sample.trace_key])
        places = np.flatnonzero(positions)
        passages = [reading.passage(place, int(ids[place])) for place in places.tolist()]
        if len(places) and not any(passages):
            raise PairError(
                f"{sample.source or 'a trace'}: {teacher} and {student} spell none of its supervised text alike; one "
                "of their tokenizers changes it. Leave the trace out, or train on text (no teacher)."
            )
        vocabularies.observe(passage for passage in passages if passage is not None)
    return Translation(vocabularies, readings, tokenizer_hash(load_tokenizer(student)), reader.read_as)


def _lengths(spelling: Spelling, ids: Sequence[int]) -> np.ndarray:
    return np.array([len(spelling.table[token]) for token in ids], dtype=np.int64)
