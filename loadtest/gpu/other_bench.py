"""An encoder-decoder and an encoder of real size, one row each: a decode step, and reading whole prompts."""

from typing import Final

from loadtest.gpu.ground import Ground
from loadtest.gpu.random_adapters import lora
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.rows import Steps
from loadtest.gpu.serving import Outcomes
from loadtest.gpu.shapes import encoder, encoder_decoder
from loadtest.gpu.timing import Spread, in_turns
from loadtest.work import Load

NUM_ROWS: Final = 32
NUM_SOURCE: Final = 128
CONTEXT: Final = 32
RANK: Final = 16
_EACH_S: Final = 6.0


def others(ground: Ground) -> Found:
    """The base alone and with every row another adapter of rank 16, in turns."""
    decoded, how = _encoder_decoder(ground)
    rows = (decoded, _encoder(ground))
    columns = ("shape", "rows", "step", "base ms", "spread", "distinct adapters ms", "spread", "over base", "tokens/s")
    title = f"Other shapes, and adapters of rank {RANK} at every linear layer"
    ground.bases.drop()
    return Found(figures=(Figures(title=title, columns=columns, rows=rows, notes=(how,)),))


def _encoder_decoder(ground: Ground) -> tuple[tuple[Value, ...], str]:
    """The row, and how its steps were run."""
    quick = ground.is_quick
    shape = encoder_decoder(is_quick=quick)
    base = ground.bases.get(shape)
    load = Load(num_rows=2 if quick else NUM_ROWS, context=4 if quick else CONTEXT)
    outcomes = Outcomes()
    capturing = ground.bases.capturing_at_once(max_rows=load.num_rows, told=outcomes.note)
    steps = Steps(base, [load], num_source=8 if quick else NUM_SOURCE, capturing=capturing)
    adapters = {n: lora(base, f"e{n}", 4 if quick else RANK, seed=n) for n in range(1, load.num_rows + 1)}
    with steps.holding(adapters):
        own, plain = steps.decoding(load, list(adapters)), steps.decoding(load)
        steps.encode(plain)
        took = in_turns(ground, {"base": lambda: steps.run(plain), "own": lambda: steps.run(own)}, most_s=_EACH_S)
    return _row(shape.name, load, f"decode, {steps.num_source} of source", took), outcomes.words()


def _encoder(ground: Ground) -> tuple[Value, ...]:
    quick = ground.is_quick
    shape = encoder(is_quick=quick)
    base = ground.bases.get(shape)
    load = Load(num_rows=2 if quick else NUM_ROWS, num_tokens=8 if quick else NUM_SOURCE)
    steps = Steps(base, [])
    adapters = {n: lora(base, f"r{n}", 4 if quick else RANK, seed=n) for n in range(1, load.num_rows + 1)}
    with steps.holding(adapters):
        own, plain = steps.reading(load, list(adapters)), steps.reading(load)
        took = in_turns(ground, {"base": lambda: steps.run(plain), "own": lambda: steps.run(own)}, most_s=_EACH_S)
    return _row(shape.name, load, f"read {load.num_tokens} tokens", took)


def _row(name: str, load: Load, what: str, took: dict[str, Spread]) -> tuple[Value, ...]:
    base, own = took["base"], took["own"]
    speed = load.total_tokens / own.median_s
    times = (1e3 * base.median_s, base.words, 1e3 * own.median_s, own.words, own.median_s / base.median_s)
    return name, load.num_rows, what, *times, speed
