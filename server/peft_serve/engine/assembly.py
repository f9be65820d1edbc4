"""Makes a server's inside from its settings: base, adapters, scheduler and engine, in that order.

The one place that knows every part by its class. Nothing here runs a request.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import peft_serve
from peft_serve.adapters.compiled_store import CompiledStore
from peft_serve.adapters.eviction import make_policy
from peft_serve.adapters.heads import own_facts
from peft_serve.adapters.host_cache import HostCache
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.load_costs import LoadCosts
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.adapters.sources.opening import Sources
from peft_serve.adapters.store_protocol import Store
from peft_serve.config import Settings
from peft_serve.core import AdapterId
from peft_serve.engine.adapter_places import local_folder, make_catalog, make_follower, open_store
from peft_serve.engine.before_loading import check_settings
from peft_serve.engine.build_facts import build_facts
from peft_serve.engine.cache_figures import CacheFigures
from peft_serve.engine.cache_trace import CacheTrace, appender
from peft_serve.engine.cpu_kernels import speed_up
from peft_serve.engine.device_memory import DeviceMemory, Sizes, device_memory
from peft_serve.engine.gpu_graphs import MakeRunner, runner_maker
from peft_serve.engine.gpu_kernels import speed_up as speed_up_on_gpu
from peft_serve.engine.gpu_warm_up import StepSizes, warm_up
from peft_serve.engine.loading import Loading, num_load_threads, open_compiled_store
from peft_serve.engine.loop import Engine
from peft_serve.engine.parts import BaseCard, ServerParts
from peft_serve.engine.preparation import Preparation
from peft_serve.engine.speech import with_speech_checked
from peft_serve.metrics import Metrics
from peft_serve.model.base import ResidentBase
from peft_serve.model.loader import load_base, locate, name_of, require_configuration
from peft_serve.model.quantised import num_parameters, quantisation_of
from peft_serve.rendering.templates import ChatTemplates
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.order import order_of
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger
from peft_serve.text import TextCodec

_BESIDE = 1
"""torch threads of every thread but the engine's. An OpenMP runtime stops spinning between parallel regions as soon as
a second team of threads exists, and then each small product of a step pays a wake-up: measured 150 us against 8 us
(docs/decisions/0003-one-team-of-threads.md). The number is a setting of the calling thread, so it is set where the
work is done."""

_LESS_MEMORY = (
    "take a smaller base, --quantisation, a smaller --gpu-memory-utilization, or smaller --kv-cache-bytes and "
    "--device-adapter-bytes"
)
_AFFINITY_AGE_S = 2.0
_OVERTAKEN_S = {"fcfs": 0.0, "affinity": _AFFINITY_AGE_S, "fair": _AFFINITY_AGE_S}


OpenStore = Callable[[Settings, Path], Store]


def build(
    settings: Settings, say: Callable[[str], None], *, opens: OpenStore = open_store
) -> tuple[ServerParts, Engine]:
    """Load the base and make everything around it; the engine is made but not started. `opens` the store of uploads.

    Whatever can be wrong with the device, with folders and the store's lock is found before the weights are read.
    """
    check_settings(settings)
    require_configuration(settings.model, revision=settings.revision)  # a base that is not there gets no store
    root = local_folder(settings, settings.served_model_name or name_of(settings.model))
    store = opens(settings, root)
    try:
        return _built(settings, store, root, say)
    except BaseException as error:
        store.close()
        if is_short_of_memory(error):
            raise ValueError(f"the server does not fit into memory ({error}); {_LESS_MEMORY}") from error
        raise


def _built(settings: Settings, store: Store, root: Path, say: Callable[[str], None]) -> tuple[ServerParts, Engine]:
    num_threads = settings.num_threads or torch.get_num_threads()
    sources = Sources(settings.allow_source)
    torch.set_num_threads(_BESIDE)
    base = load_base(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        quantisation=settings.quantisation,
        revision=settings.revision,
        on_progress=say,
    )
    speed_up(settings, base, os.environ, say)
    kernels = speed_up_on_gpu(settings.gpu_kernels, base, say)
    card = _card(settings, base)
    size = f"{card.num_parameters / 1e6:.1f} M parameters"
    stored = "" if card.quantisation is None else f", weights in {card.quantisation}"
    say(f"base {card.name}: {card.class_name}, {size}, {card.dtype}{stored}, {card.device}")
    codec = TextCodec.load(
        locate(settings.model), is_encoder_decoder=card.is_encoder_decoder, revision=settings.revision
    )
    fingerprint = base.fingerprint()
    metrics = Metrics(model_name=card.name, build=build_facts(card))
    limits = gate_limits(settings, card.max_context)
    templates = ChatTemplates() if settings.allow_chat_templates else None
    compiled = open_compiled_store(settings, base, limits, root, metrics, fingerprint, _stand_aside)
    loading = Loading(
        base,
        limits,
        compiled,
        speech=lambda found: with_speech_checked(found, codec, vocab_size=card.vocab_size, templates=templates),
        stand_aside=_stand_aside,
    )
    words = f"{codec.fingerprint()} {settings.allow_chat_templates}"
    checked_for = f"{peft_serve.__version__} {fingerprint} {words} {limits}"
    store.tell_of_detached(compiled.forget)
    catalog = make_catalog(settings, store, root, card.name, loading, checked_for, say)
    make_runner = runner_maker(settings, base, kernels, metrics, say)
    if kernels is not None:
        warm_up(base, _step_sizes(settings, base), say, clock=time.monotonic)
    memory = device_memory(settings, base, card.max_context, say)
    load = partial(loading.load, files_of=catalog.files)
    engine = _make_engine(settings, base, memory, load, make_runner, metrics, num_threads, compiled)
    parts = ServerParts(
        settings=settings,
        base=card,
        codec=codec,
        catalog=catalog,
        inspect=lambda files: loading.check(files, keeps=False),
        engine=engine,
        metrics=metrics,
        clock=time.monotonic,
        check_base=partial(_is_unchanged, base, fingerprint),
        templates=templates,
        checked_for=checked_for,
        sources=sources,
        follower=make_follower(settings, catalog, engine),
    )
    return parts, engine


def gate_limits(settings: Settings, max_context: int) -> GateLimits:
    """The part of the settings that decides which adapters are let in."""
    return GateLimits(
        max_new_tokens=min(settings.max_new_tokens, max_context),
        max_rank=settings.max_rank,
        max_adapter_bytes=min(settings.max_adapter_bytes, settings.device_adapter_bytes),
        max_virtual_tokens=settings.max_virtual_tokens,
        max_compile_tflop=settings.max_compile_tflop,
    )


def _max_context(settings: Settings, base: ResidentBase) -> int:
    own = base.shape.max_positions
    asked = settings.max_model_len or own
    if asked > own and base.runs.has_position_limit:
        raise ValueError(
            f"--max-model-len {asked}: {base.name} has positions for {own}; leave the option out or give at most {own}"
        )
    return asked


def _step_sizes(settings: Settings, base: ResidentBase) -> StepSizes:
    return StepSizes(
        max_rows=settings.max_rows,
        max_step_tokens=settings.max_step_tokens,
        max_context=_max_context(settings, base),
        block_size=settings.block_size,
    )


def _card(settings: Settings, base: ResidentBase) -> BaseCard:
    head = own_facts(base)
    return BaseCard(
        name=settings.served_model_name or base.name,
        family=base.family,
        class_name=base.class_name,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        num_parameters=num_parameters(base.model),
        is_encoder_decoder=base.shape.is_encoder_decoder,
        vocab_size=base.shape.vocab_size,
        max_context=_max_context(settings, base),
        eos_ids=base.eos_ids,
        decoder_start=base.decoder_start_ids,
        forced_first=base.forced_first,
        forced_last=base.forced_last,
        is_encoder=base.shape.is_encoder or (not base.shape.generates and head is None),  # a bare body is read as one
        head=head,
        labels=base.labels,
        quantisation=quantisation_of(base.model.config, settings.quantisation),
    )


def _make_engine(
    settings: Settings,
    base: ResidentBase,
    memory: DeviceMemory,
    load: Callable[[AdapterId], Adapter],
    make_runner: MakeRunner,
    metrics: Metrics,
    num_threads: int,
    compiled: CompiledStore,
) -> Engine:
    def stop() -> None:
        compiled.settle()
        if trace is not None:
            trace.stop()

    sizes = memory.sizes
    block_size, ready = settings.block_size, Preparation(base, load, memory.carrier)
    costs = LoadCosts()
    trace = _start_trace(settings)
    figures = CacheFigures(metrics, costs, trace)
    slots = SlotLedger(
        num_slots=settings.max_resident_adapters,
        max_bytes=sizes.max_adapter_bytes,
        policy=make_policy(settings.eviction_policy, costs.seconds),
        on_lookup=figures.looked_up,
    )
    return Engine(
        scheduler=_make_scheduler(settings, base, sizes, slots),
        make_runner=lambda adapters: make_runner(
            num_blocks=sizes.num_blocks,
            num_cross_blocks=sizes.num_cross_blocks,
            block_size=block_size,
            adapters=adapters,
            carrier=memory.carrier,
        ),
        host_cache=HostCache(
            ready.load,
            max_bytes=settings.host_adapter_bytes,
            clock=time.monotonic,
            num_threads=num_load_threads(settings),
            policy=make_policy(settings.eviction_policy, costs.seconds),
            on_lookup=figures.looked_up,
            on_evict=figures.evicted_from_host,
        ),
        metrics=metrics,
        clock=time.monotonic,
        draw_seed=_seed_source(),
        max_queue=settings.max_queue,
        footprint_of=ready.footprint,
        block_size=block_size,
        on_thread_start=lambda: _claim_threads(num_threads),
        on_stop=stop,
    )


def _start_trace(settings: Settings) -> CacheTrace | None:
    if settings.cache_trace is None:
        return None
    trace = CacheTrace(appender(settings.cache_trace), now=time.time)
    trace.start()
    return trace


def _make_scheduler(settings: Settings, base: ResidentBase, sizes: Sizes, slots: SlotLedger) -> Scheduler:
    block_size, shape = settings.block_size, base.shape
    cross_blocks = None
    if shape.is_encoder_decoder:
        cross_blocks = BlockLedger(num_blocks=sizes.num_cross_blocks, block_size=block_size)
    return Scheduler(
        Limits(
            max_rows=settings.max_rows,
            max_step_tokens=settings.max_step_tokens,
            max_step_s=settings.max_step_s,
            max_step_adapters=settings.max_step_adapters,
            max_step_rank=4 * settings.max_rank,
            max_queue=settings.max_queue,
            block_size=block_size,
            max_context=_max_context(settings, base),
            is_encoder_decoder=shape.is_encoder_decoder,
            is_encoder=shape.is_encoder,
            pad_id=base.pad_id,
            affinity_age_s=_OVERTAKEN_S[settings.scheduling_policy],
            prefix_caching=settings.enable_prefix_caching,
            num_adapter_blocks=sizes.num_adapter_blocks,
            reads_host_copies=base.device.type == "cpu" and sizes.spacing == 1,  # in blocks they are copies
        ),
        slots=slots,
        blocks=BlockLedger(num_blocks=sizes.num_blocks, block_size=block_size, spacing=sizes.spacing),
        cross_blocks=cross_blocks,
        clock=time.monotonic,
        order=order_of(settings.scheduling_policy, has_tenants=settings.api_keys_file is not None),
    )


def _is_unchanged(base: ResidentBase, fingerprint: str) -> bool:
    """Whether the base's weights are still those it was started with. On the calling thread alone: packed ones are read
    by a kernel, which would start a second team."""
    _stand_aside()
    return base.fingerprint() == fingerprint


def _stand_aside() -> None:
    torch.set_num_threads(_BESIDE)


def _claim_threads(num_threads: int) -> None:
    """Make the calling thread the one that computes on so many cores.

    A thread takes the number that was set last, by whichever thread, when it first computes; asking for it makes it
    take the number now.
    """
    torch.set_num_threads(num_threads)
    torch.get_num_threads()


def _seed_source() -> Callable[[], int]:
    source, lock = random.SystemRandom(), threading.Lock()

    def draw() -> int:
        with lock:
            return source.getrandbits(32)

    return draw
