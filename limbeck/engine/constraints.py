"""Texts of a given form: JSON of a schema, a regular expression, one of some strings.

llguidance (MIT) says which tokens may come. It was chosen over xgrammar after trying both: a schema is compiled in
1.5 ms instead of 410 (smollm2's 49,152 tokens, one core), a mask takes 0.4 ms instead of 0.3, and its wheel of 8 MB
needs nothing, where xgrammar's needs triton with 1 GB.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import ConfigError

ONE_SPACE: Any = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?"}
"""Between the parts of a JSON text; without a limit small models write spaces for ever."""


class GrammarConstraint:
    """A text under way in a grammar."""

    def __init__(self, matcher: Any, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._end_tokens = matcher, vocab_size, sorted(end_tokens)

    def allowed(self) -> Tensor | None:
        """bool [V]; the job's end tokens where the text may end."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        known = min(self._vocab_size, len(bits))
        mask[:known] = torch.from_numpy(bits[:known]).bool()
        mask[self._end_tokens] = self._matcher.is_accepting()
        return mask

    def accept(self, token: int) -> None:
        """Go on by a token, which `allowed` has allowed."""
        if not self._matcher.consume_token(token):
            raise AssertionError(f"token {token} is not allowed here: {self._matcher.get_error()}")

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Constraints for the vocabulary of one tokenizer; made once, since reading the vocabulary takes a second."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """Read the vocabulary.

        Args:
          tokenizer: a fast tokenizer of transformers.
          vocab_size: of the model's head; tokens beyond those of the tokenizer are never allowed.
        Raises: ConfigError where llguidance is not installed, or the tokenizer is not a fast one.
        """
        try:
            import llguidance.hf  # of the extra `serve`
        except ImportError:
            raise ConfigError("constraints need llguidance: pip install 'limbeck[serve]'.") from None
        self._vocab_size = vocab_size
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)))
        except ValueError as error:
            raise ConfigError(f"{type(tokenizer).__name__}: llguidance cannot read its vocabulary ({error}).") from None
        self._matcher = llguidance.LLMatcher

    def json_schema(self, schema: Mapping[str, Any] | bool, end_tokens: frozenset[int]) -> GrammarConstraint:
        """JSON texts that are valid under a schema. Raises: ConfigError for what llguidance does not support."""
        if schema is False:
            raise ConfigError("json_schema: false has no text that is valid under it.")
        source = {} if schema is True else dict(schema)
        make = functools.partial(self._matcher.grammar_from_json_schema, overrides=ONE_SPACE)
        return self._compile("json_schema", make, source, end_tokens)

    def json_object(self, end_tokens: frozenset[int]) -> GrammarConstraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, end_tokens)

    def regex(self, pattern: str, end_tokens: frozenset[int]) -> GrammarConstraint:
        """Texts that a regular expression matches as a whole (syntax of Rust's regex)."""
        return self._compile("regex", self._matcher.grammar_from_regex, pattern, end_tokens)

    def choice(self, options: Sequence[str], end_tokens: frozenset[int]) -> GrammarConstraint:
        """One of some strings."""
        if not options or not all(options):
            raise ConfigError("choice: give one option or more, none of them empty.")
        quoted = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
        return self._compile("choice", self._matcher.grammar_from_lark, f"start: {quoted}", end_tokens)

    def _compile(self, kind: str, make: Any, source: Any, end_tokens: frozenset[int]) -> GrammarConstraint:
        try:
            matcher = self._matcher(self._tokenizer, make(source))
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ConfigError(f"{kind}: {' '.join(problem.split())}")
        return GrammarConstraint(matcher, self._vocab_size, end_tokens)
