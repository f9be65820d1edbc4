"""The server that `python -m loadtest ceiling` measures: the real application over a fake engine, or over the real one.

``python -m loadtest.ceiling_server serve BASE --port P`` takes its tokenizer from BASE and answers without a model;
``--real`` runs the base as `peft-serve serve` does. Either way the event loop is watched (`loadtest.loop_watch`).
"""

import json
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import uvicorn

from loadtest.fake_engine import FakeEngine
from loadtest.loop_watch import LoopWatch
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.gate import Inspected
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.store import AdapterStore
from peft_serve.api.app import create_app
from peft_serve.commands.interpreter import settle_interpreter
from peft_serve.config import Settings
from peft_serve.engine.assembly import build
from peft_serve.engine.parts import BaseCard, ServerParts
from peft_serve.errors import AdapterInvalid, Refusal
from peft_serve.metrics import Metrics
from peft_serve.model.loader import locate
from peft_serve.text import TextCodec

NAME = "ceiling"
SAID = "The weather today is fine, and nobody at the desk knows how long that will last. "
MAX_CONTEXT = 1 << 20


def main() -> None:
    """Serve until told to stop."""
    parser = ArgumentParser(prog="python -m loadtest.ceiling_server")
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("base")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--real", action="store_true", help="run the base")
    parser.add_argument("--step-ms", type=float, default=50.0, help="a step of the fake engine")
    parser.add_argument("--max-rows", type=int, default=64, help="requests that run at the same time")
    parser.add_argument("--num-threads", type=int, default=1)
    parsed = parser.parse_args()
    with _parts(parsed) as parts:
        settle_interpreter()
        config = uvicorn.Config(
            LoopWatch(create_app(parts)),
            host=parsed.host,
            port=parsed.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run()


@contextmanager
def _parts(parsed: Namespace) -> Iterator[ServerParts]:
    with tempfile.TemporaryDirectory(prefix="loadtest-ceiling-") as store:
        settings = Settings(
            model=parsed.base,
            store=Path(store),
            num_threads=parsed.num_threads,
            max_rows=parsed.max_rows,
            max_queue=1 << 14,
        )
        if parsed.real:
            parts, engine = build(settings, print)
            engine.start()
            yield parts
            engine.stop()
            return
        codec = TextCodec.load(locate(settings.model), is_encoder_decoder=False)
        fake = FakeEngine(codec.encode(SAID), step_s=parsed.step_ms / 1e3, max_rows=parsed.max_rows)
        fake.start()
        yield _around(fake, settings, codec)
        fake.stop()


def _around(engine: FakeEngine, settings: Settings, codec: TextCodec) -> ServerParts:
    disk = DiskFileSystem()
    assert settings.store is not None, "a server of its own has a store of its own"
    vocab = json.loads((Path(locate(settings.model)) / "config.json").read_text())["vocab_size"]
    return ServerParts(
        settings=settings,
        base=BaseCard(
            name=NAME,
            family="fake",
            class_name="Fake",
            dtype="float32",
            device="cpu",
            num_parameters=1,
            is_encoder_decoder=False,
            vocab_size=int(vocab),
            max_context=MAX_CONTEXT,
            eos_ids=frozenset(),
            decoder_start=(),
        ),
        codec=codec,
        catalog=Catalog(
            AdapterStore(Path(settings.store), disk),
            CheckpointFolders([], disk, base_name=NAME),
            _no_adapters,
            checked_for=NAME,
            base_name=NAME,
            now=lambda: datetime.now(UTC),
        ),
        inspect=_no_adapters,
        engine=engine,
        metrics=Metrics(),
        clock=time.monotonic,
        check_base=lambda: True,
    )


def _no_adapters(_: CheckpointFiles) -> Inspected:
    raise AdapterInvalid([Refusal("engine", "computes nothing and takes no adapters")])


if __name__ == "__main__":
    main()
