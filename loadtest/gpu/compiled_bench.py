"""Would prompts be faster compiled? The base's layers by `torch.compile` against ours and against transformers' own.

The compiled model is a second one of the same shape, without sites for adapters and without blocks of keys and values:
the most that compiling our prompts could come to. All three end with the next token on the host. Each layer is compiled
by itself, and once: they are equal but for their weights.
"""

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from loadtest.gpu.facts import ceilings
from loadtest.gpu.ground import Ground
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.rows import Steps
from loadtest.gpu.shapes import decoder, make
from loadtest.gpu.timing import in_turns
from loadtest.work import Load, base_work

LENGTHS: Final = (512, 4096)
BACKEND: Final = "inductor"
_EACH_S: Final = 4.0
_NEEDS_S: Final = 20.0  # to compile a layer, and to measure it
_SPARE: Final = 1.3  # times the bytes of the weights


def prompts(ground: Ground) -> Found:
    """One row of the table for each length."""
    shape = decoder(is_quick=ground.is_quick)
    base = ground.bases.get(shape)
    num_bytes = sum(weight.nbytes for weight in base.model.parameters())
    if ground.is_gpu and torch.cuda.mem_get_info(ground.device)[0] < _SPARE * num_bytes:
        return Found(left_out=("a second model of the same shape has no memory",))
    model, rows, left_out = make(shape, ground.device), list[tuple[Value, ...]](), tuple[str, ...]()
    for length in (8,) if ground.is_quick else LENGTHS:
        if rows and ground.left_s < _NEEDS_S:
            left_out = (f"a prompt of {length} tokens: no time was left",)
            break
        load = Load(num_rows=1, num_tokens=length)
        steps = Steps(base, [load])
        (row,) = steps.decoding(load)
        ids = torch.tensor([row.tokens], device=ground.device)
        with torch.compiler.set_stance("force_eager"):
            plain_H = _states(model, ids)
        compile_s, num_graphs = _compile(ground, model, ids)
        error = float((_states(model, ids) - plain_H).abs().max() / plain_H.abs().max())
        acts = {
            "ours": partial(steps.run, (row,)),
            "compiled": partial(_token, model, ids),
            "transformers": partial(_as_it_is, model, ids),
        }
        took = in_turns(ground, acts, most_s=_EACH_S)
        ours, compiled, plain = (took[name] for name in acts)
        bound_s = base_work(base, load).bound_s(ceilings(ground))
        times = (1e3 * bound_s, 1e3 * ours.median_s, ours.words, 1e3 * compiled.median_s, compiled.words)
        over = (1e3 * plain.median_s, ours.median_s / compiled.median_s)
        rows.append((length, *times, *over, compile_s, num_graphs, error))
    columns = (
        *("prompt", "bound ms", "ours ms", "spread", "compiled ms", "spread", "transformers ms", "ours over compiled"),
        *("compiling s", "graphs", "differs by"),
    )
    title = f"A prompt of the base alone, compiled and as it is, {shape.name}"
    note = "1 graph: every layer runs the one that was compiled; more, and some layers may run as they are"
    figures = Figures(title=title, columns=columns, rows=tuple(rows), notes=(ground.bases.runs_by, note))
    return Found(figures=(figures,), left_out=left_out)


def _compile(ground: Ground, model: Any, ids: Tensor) -> tuple[float, int]:
    """Compile its layers for prompts of this length: seconds until the first pass was through, and graphs made."""
    torch.compiler.reset()
    counters.clear()
    for layer in model.model.layers:
        layer.compile(backend=BACKEND, dynamic=False)
    began_s = ground.clock()
    _states(model, ids)
    ground.settle()
    return ground.clock() - began_s, counters["stats"]["unique_graphs"]


@torch.inference_mode()
def _states(model: Any, ids: Tensor) -> Tensor:
    """The state behind the last token, in float32."""
    states: Tensor = model.model(ids, use_cache=False).last_hidden_state[0, -1]
    return states.float()


@torch.inference_mode()
def _token(model: Any, ids: Tensor) -> int:
    """The next token, on the host."""
    last_H = model.model(ids, use_cache=False).last_hidden_state[0, -1]
    return int(model.lm_head(last_H).argmax())


def _as_it_is(model: Any, ids: Tensor) -> int:
    """The same without what is compiled."""
    with torch.compiler.set_stance("force_eager"):
        return _token(model, ids)
