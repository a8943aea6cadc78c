"""Texts of a given form: JSON of a schema, a regular expression, one of some strings.

llguidance (MIT) says which tokens may come. It was chosen over xgrammar after trying both: a schema is compiled in
1.5 ms instead of 410 (smollm2's 49,152 tokens, one core), a mask takes 0.4 ms instead of 0.3, and its wheel of 8 MB
needs nothing, where xgrammar's needs triton with 1 GB.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import ConfigError


class Form(NamedTuple):
    """What texts may be."""

    kind: Literal["json_schema", "regex", "choice"]
    source: Any
    """A schema, an expression (syntax of Rust's regex, matched as a whole), or a list of strings."""


def json_schema(schema: Mapping[str, Any] | bool) -> Form:
    """JSON texts that are valid under a schema. Raises: ConfigError for one that no text is valid under."""
    if schema is False:
        raise ConfigError("json_schema: false has no text that is valid under it.")
    return Form("json_schema", {} if schema is True else dict(schema))


def regex(pattern: str) -> Form:
    """Texts that a regular expression matches as a whole."""
    return Form("regex", pattern)


def choice(options: Sequence[str]) -> Form:
    """One of some strings. Raises: ConfigError for none, or an empty one."""
    if not options or not all(options):
        raise ConfigError("choice: give one option or more, none of them empty.")
    return Form("choice", list(options))


class GrammarConstraint:
    """A text under way in a grammar.

    What goes wrong in it is this text's alone: then everything is allowed and the text is over, with its `problem`.
    """

    def __init__(
        self, start: Callable[[], Any], vocab_size: int, end_tokens: frozenset[int], grammar_bytes: int = 0
    ) -> None:
        """Set up.

        Args:
          start: gives the matcher, once the text begins.
          grammar_bytes: that the matcher takes then.
        """
        self._start, self._vocab_size, self._end_tokens = start, vocab_size, sorted(end_tokens)
        self.size_bytes = grammar_bytes + 2 * vocab_size
        """A mask has a byte and a bit a token."""
        self.problem: str | None = None
        """Why the text could not go on."""

    @functools.cached_property
    def _matcher(self) -> Any:
        return self._start()

    def allowed(self) -> Tensor | None:
        """bool [V]; the job's end tokens where the text may end. None once there is a problem."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            self.problem = _told(self._matcher.get_error())
            return None
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        known = min(self._vocab_size, len(bits))
        mask[:known] = torch.from_numpy(bits[:known]).bool()
        is_accepting = bool(self._matcher.is_accepting())
        mask[self._end_tokens] = is_accepting
        if not bool(mask.any()) and not is_accepting:
            self.problem = "no token of the vocabulary goes on with the form"
        return mask if self.problem is None else None

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if self.problem is None and not self._matcher.consume_token(token):
            self.problem = _told(self._matcher.get_error()) or f"token {token} is not allowed here"

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self.problem is not None or bool(self._matcher.is_stopped())


class Grammars:
    """Grammars for the vocabulary of one tokenizer; made once, since reading the vocabulary takes a second."""

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
        self.known = max(vocab_size, len(tokenizer))
        """Tokens of the vocabulary that grammars are compiled for."""
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=self.known)
        except ValueError as error:
            raise ConfigError(f"{type(tokenizer).__name__}: llguidance cannot read its vocabulary ({error}).") from None
        self._matcher = llguidance.LLMatcher
        self._grammar_of = importlib.import_module("limbeck.engine.form_trial").grammar_of  # needs llguidance as well

    def text(self, form: Form, end_tokens: frozenset[int]) -> GrammarConstraint:
        """A text of a form, compiled here and now: for forms of one's own, since nothing bounds its time and memory.

        Raises: ConfigError where it cannot be compiled.
        """
        try:
            grammar = self._grammar_of(form.kind, form.source)
        except ValueError as error:
            raise ConfigError(f"{form.kind}: {_told(str(error))}") from None
        return self.constraint(self.compile(grammar), end_tokens)

    def compile(self, grammar: str) -> Any:
        """A matcher at its start, to be copied for each text; `grammar` is what `form_trial` gives for a form.

        Raises: ConfigError where it cannot be compiled.
        """
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(_told(matcher.get_error()))
        return matcher

    def constraint(self, compiled: Any, end_tokens: frozenset[int], grammar_bytes: int = 0) -> GrammarConstraint:
        """A text of its own at the start of what was compiled, which takes `grammar_bytes`."""
        return GrammarConstraint(compiled.deep_copy, self._vocab_size, end_tokens, grammar_bytes)


def _told(error: str) -> str:
    """One of llguidance's errors in a line, without the state of the parser behind it."""
    return " ".join(error.partition("<state>")[0].split())[:500]
