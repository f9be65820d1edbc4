"""Who reads and writes for an adapter: the base's codec, or one of the few that are kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from peft_serve.adapters.records import Profile, Resolved
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.api.codecs import Codecs
from peft_serve.api.served import Served, ServedPart
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterInvalid, InvalidParameter
from tests.api.api_fakes import make_world

NEXT = 261  # the first id after the tokenizer's


def served(*vocabularies: Vocabulary, first: int = 0) -> Served:
    parts = tuple(
        ServedPart(
            resolved=Resolved(
                name=f"a{first + i}",
                number=1,
                id=AdapterId(f"sha256:{first + i}"),
                peft_type="LORA",
                num_virtual_tokens=0,
                profile=Profile(),
                vocabulary=vocabulary,
            )
        )
        for i, vocabulary in enumerate(vocabularies)
    )
    return Served(name="+".join(part.resolved.name for part in parts) or "base", parts=parts)


@pytest.fixture
def codecs(tiny_tokenizer: Any, tmp_path: Path) -> Codecs:
    world = make_world(tiny_tokenizer, tmp_path, card={"vocab_size": 264})
    return Codecs(world.parts, max_codecs=2)


async def test_who_brings_nothing_speaks_as_the_base(codecs: Codecs) -> None:
    base = await codecs.of(Served())
    assert await codecs.of(served(Vocabulary(), Vocabulary())) is base
    assert await codecs.of(served(Vocabulary(added={"</s>": 1}))) is base
    assert await codecs.of(served(Vocabulary(chat_template="x"), first=5)) is base, "templates are not allowed"


async def test_one_vocabulary_in_a_combination(codecs: Codecs) -> None:
    own = Vocabulary(added={"<x>": NEXT})
    codec = await codecs.of(served(Vocabulary(), own))
    assert codec.encode("<x>") == (NEXT,)
    assert (await codecs.of(served(own, own, first=3))).encode("<x>") == (NEXT,)
    with pytest.raises(InvalidParameter, match="a7 and a8 bring different"):
        await codecs.of(served(own, Vocabulary(added={"<y>": NEXT}), first=7))


async def test_a_codec_is_made_once_and_kept_while_it_is_among_the_last(codecs: Codecs) -> None:
    one, two, three = (served(Vocabulary(added={"<x>": NEXT}), first=i) for i in range(3))
    first, again = await asyncio.gather(codecs.of(one), codecs.of(one))
    assert first is again
    await codecs.of(two)
    assert await codecs.of(one) is first
    await codecs.of(three)
    assert await codecs.of(one) is first, "two was asked for longest ago"
    await codecs.of(two)
    await codecs.of(three)
    assert await codecs.of(one) is not first


async def test_tokens_that_do_not_fit_are_refused_and_nothing_is_kept(codecs: Codecs) -> None:
    for _ in range(2):
        with pytest.raises(AdapterInvalid):
            await codecs.of(served(Vocabulary(added={"<x>": 500})))


async def test_messages_are_for_own_templates_only(codecs: Codecs) -> None:
    codec = await codecs.of(Served())
    assert await codecs.chat_prompt(codec, [{"role": "user", "content": "hi"}], "base") is None
