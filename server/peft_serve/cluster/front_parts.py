"""The parts of a server whose engine is elsewhere: what `engine.assembly` makes, without base, weights and kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.combined import parts_of
from peft_serve.adapters.sources.opening import Sources
from peft_serve.adapters.store_protocol import Store
from peft_serve.cluster.remote_engine import RemoteEngine
from peft_serve.cluster.remote_gate import RemoteGate
from peft_serve.cluster.replicas import Homes
from peft_serve.cluster.wire import BaseFacts
from peft_serve.config import Settings
from peft_serve.core import BASE, AdapterId
from peft_serve.engine.adapter_places import local_folder, make_catalog, make_follower, open_store
from peft_serve.engine.build_facts import build_facts
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import Unavailable
from peft_serve.metrics import Metrics
from peft_serve.model.loader import locate, name_of
from peft_serve.rendering.templates import ChatTemplates
from peft_serve.text import TextCodec

LOCK_S: Final = 60.0
"""So long a front waits for the store of the one before it, which ends its last requests."""

_LOOK_S: Final = 0.5


def front_parts(
    settings: Settings,
    facts: BaseFacts,
    engine: RemoteEngine,
    gate: RemoteGate,
    registry: CollectorRegistry,
    say: Callable[[str], None],
    on_change: Callable[[], None] = lambda: None,
) -> ServerParts:
    """Everything that HTTP needs. Blocks while the tokenizer is read. `engine` is told where folders' adapters lie, and
    `on_change` whenever a store that is shared was changed here."""
    card = facts.card
    codec = TextCodec.load(
        locate(settings.model), is_encoder_decoder=card.is_encoder_decoder, revision=settings.revision
    )
    root = local_folder(settings, settings.served_model_name or name_of(settings.model))
    store = opened(settings, root)
    store.tell_of_changes(on_change)
    catalog = make_catalog(settings, store, root, card.name, gate, facts.checked_for, say)
    engine.homes_of = lambda adapter: homes_of(catalog, adapter)
    return ServerParts(
        settings=settings,
        base=card,
        codec=codec,
        catalog=catalog,
        inspect=gate.check,
        engine=engine,
        metrics=Metrics(registry, model_name=card.name, build=build_facts(card)),
        clock=time.monotonic,
        check_base=lambda: True,  # every replica watches its own
        templates=ChatTemplates() if settings.allow_chat_templates else None,
        checked_for=facts.checked_for,
        sources=Sources(settings.allow_source),
        follower=make_follower(settings, catalog, engine),
    )


def opened(
    settings: Settings,
    root: Path,
    *,
    opens: Callable[[Settings, Path], Store] = open_store,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Store:
    """The store of uploads, once nobody else has it. Raises Unavailable after `LOCK_S`."""
    began_s = clock()
    while True:
        try:
            return opens(settings, root)
        except Unavailable:
            if clock() - began_s > LOCK_S:
                raise
        sleep(_LOOK_S)


def homes_of(catalog: Catalog, adapter: AdapterId) -> Homes:
    """Where the checkpoints of an adapter, or of a combination, lie in read-only folders."""
    if adapter == BASE:
        return {}
    found = {part.id: catalog.folder_of(part.id) for part in parts_of(adapter)}
    return {id_: name for id_, name in found.items() if name is not None}
