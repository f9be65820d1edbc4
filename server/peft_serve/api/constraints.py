"""From the form that an answer is to have to what the engine holds it to.

Owns the compiler of grammars, and knows which vocabulary a request is answered in. Knows no body.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from peft_serve.api.forms import Form, field_of, refused
from peft_serve.core import Constraint
from peft_serve.errors import InvalidParameter
from peft_serve.grammars.compiler import GrammarCompiler
from peft_serve.grammars.grammar import GrammarRefused
from peft_serve.grammars.matching import GrammarConstraint
from peft_serve.grammars.spelling import Spelling, Unspellable, spelling_of
from peft_serve.text import TextCodec


class Constraints:
    """See the module's docstring. Used on the event loop's thread."""

    def __init__(self, compiler: GrammarCompiler, *, vocab_size: int, max_bytes: int) -> None:
        """`vocab_size` counts the rows of the base's embedding; a grammar of more than `max_bytes` is refused."""
        self._compiler = compiler
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._keys: WeakKeyDictionary[TextCodec, object] = WeakKeyDictionary()

    async def of(self, form: Form, codec: TextCodec, eos_ids: frozenset[int]) -> Constraint:
        """What holds answers written by `codec` to the form; raises InvalidParameter and QueueFull."""
        num_bytes = form.grammar.num_bytes
        if num_bytes > self._max_bytes:
            raise InvalidParameter(
                f"{form.place}: {num_bytes} bytes; this server takes grammars and schemas of at most "
                f"{self._max_bytes} (--max-grammar-bytes)",
                param=field_of(form.place),
            )
        # The compiler remembers the key for long, and must not keep a codec that is forgotten elsewhere.
        key = self._keys.setdefault(codec, object())
        try:
            compiled = await self._compiler.compiled(key, lambda: self._spelled(codec), form.grammar)
        except GrammarRefused as error:
            raise refused(form.place, error) from error
        return GrammarConstraint(compiled, eos_ids)

    def _spelled(self, codec: TextCodec) -> Spelling:
        description = codec.description()
        if description is None:
            raise Unspellable("it is written in Python, and does not tell how its tokens are spelled")
        spelling = spelling_of(description, special=codec.special_ids, size=self._vocab_size)
        # Only an answer that is a text of its own loses the space; one that continues its prompt keeps it.
        return replace(spelling, drops_first_space=spelling.drops_first_space and codec.is_encoder_decoder)
