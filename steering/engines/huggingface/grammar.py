"""Grammars of response formats, and where in one a choice stands: which tokens may come next. Knows no model.

The library and its options are vLLM's (`vllm/start.py`), so that both engines allow the same answers. It is imported
where it is first needed: its import asks for a GPU, and a process that has cannot fork vLLM's any more.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.engines.base import ResponseFormat
from steering.engines.grammar_trial import bad_schema, spell
from steering.errors import InvalidSteering

if TYPE_CHECKING:
    import xgrammar

ANY_OBJECT = '{"type": "object"}'
REMEMBERED = 64


class Grammars:
    """Makes grammars for one model's vocabulary. Thread-safe; the library works outside Python's lock."""

    def __init__(self, tokenizer: Any, vocabulary_size: int, end_tokens: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary_size, self._end_tokens = tokenizer, vocabulary_size, sorted(end_tokens)
        self._compile = lru_cache(REMEMBERED)(self._compile_schema)

    def begin(self, wanted: ResponseFormat) -> ChoiceGrammar:
        """A choice's grammar at its beginning. Raises InvalidSteering; what can take long is to be tried before."""
        grammar = self._compile(ANY_OBJECT if wanted.json_schema is None else wanted.json_schema)
        return ChoiceGrammar(grammar, self._vocabulary_size, self._end_tokens)

    @cached_property
    def _compiler(self) -> xgrammar.GrammarCompiler:
        import xgrammar

        vocabulary = xgrammar.TokenizerInfo(
            spell(self._tokenizer, self._vocabulary_size), vocab_size=self._vocabulary_size,
            stop_token_ids=self._end_tokens,
        )  # fmt: skip
        return xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)

    def _compile_schema(self, schema: str) -> xgrammar.CompiledGrammar:
        try:
            return self._compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        except RuntimeError as error:
            raise bad_schema(str(error)[:300]) from error


class ChoiceGrammar:
    """One choice's way through its grammar."""

    def __init__(self, grammar: xgrammar.CompiledGrammar, vocabulary_size: int, end_tokens: list[int]) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(grammar, override_stop_tokens=end_tokens)
        self._allowed_1W = xgrammar.allocate_token_bitmask(1, vocabulary_size)
        """A bit a token."""

    def mask(self, logits_V: Tensor) -> Tensor:
        """A copy in which tokens that may not come next are -inf; an end may come where the text is whole."""
        import xgrammar

        masked_1V = logits_V.to("cpu", torch.float32, copy=True)[None]
        self._matcher.fill_next_token_bitmask(self._allowed_1W)
        xgrammar.apply_token_bitmask_inplace(masked_1V, self._allowed_1W)
        if masked_1V.max() == float("-inf"):
            raise InvalidSteering(
                "response_format: no token of this model can go on from here; ask for less", field="response_format"
            )
        return masked_1V[0]

    def advance(self, token: int) -> None:
        """The token that was chosen, an end too."""
        accepted = self._matcher.accept_token(token)
        assert accepted, "it was not masked"
