"""Small tokenizers of every kind that a base may have, and a compiler to put grammars over them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from peft_serve.grammars.compiler import GrammarCompiler
from peft_serve.grammars.grammar import Grammar
from peft_serve.grammars.matching import CompiledGrammar, GrammarConstraint, GrammarMatcher
from peft_serve.grammars.spelling import Spelling, spelling_of

EOS = 1
SPECIAL = ["<pad>", "</s>", "<unk>"]
SPACE = "\u2581"
PIECES = ["{", "}", '"', ":", ",", "a", "b", "name", " {", '{"', "true", "12", " a", "é"]


def byte_level() -> Tokenizer:
    """Every byte, and some longer pieces, as GPT-2 writes them."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [written for piece in PIECES if len(written := letters.pre_tokenize_str(piece)[0][0]) > 1]
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _finished(made)


def sentencepiece_bpe() -> Tokenizer:
    """Llama 2's kind: a space is a letter of its own, bytes stand in for what there is no piece for."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [SPACE, *(piece.replace(" ", SPACE) for piece in PIECES)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(made)


def unigram() -> Tokenizer:
    """T5's kind."""
    pieces = [SPACE, *(piece.replace(" ", SPACE) for piece in PIECES), *"eklmnoprst[]0123456789"]
    vocab = [(piece, -float(i)) for i, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))]
    made = Tokenizer(models.Unigram(vocab, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return _finished(made)


def word_pieces() -> Tokenizer:
    """BERT's kind, which no base that generates has."""
    made = Tokenizer(models.WordPiece({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    made.decoder = decoders.WordPiece()
    return made


def _finished(made: Tokenizer) -> Tokenizer:
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<own word>"])
    return made


def spelled(tokenizer: Tokenizer, *, beyond: int = 3) -> Spelling:
    """As a base sees it whose embedding has some rows more."""
    return spelling_of(tokenizer.to_str(), special=frozenset(), size=tokenizer.get_vocab_size() + beyond)


async def started(grammar: Grammar, tokenizer: Tokenizer | None = None) -> GrammarMatcher:
    """The beginning of an answer."""
    compiled = await compiled_over(grammar, tokenizer)
    return GrammarConstraint(compiled, frozenset({EOS})).start()


async def compiled_over(grammar: Grammar, tokenizer: Tokenizer | None = None) -> CompiledGrammar:
    return await GrammarCompiler().compiled("one", lambda: spelled(tokenizer or byte_level()), grammar)


def ids_in(mask: bytes) -> list[int]:
    return [i for i in range(len(mask) * 8) if mask[i // 8] >> (i % 8) & 1]
