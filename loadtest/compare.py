"""compare: one trace on several peers, A B B A: how fast each is, and whether they say the same.

Answers are compared as texts with the first of peft's loops among the peers, or with the first peer named.
"""

import json
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from loadtest.arguments import whole_from
from loadtest.measure import mean, percentile, ratio
from loadtest.outcome import Outcome
from loadtest.peer_llama import LlamaServer
from loadtest.peer_loops import PeftPeer
from loadtest.peer_servers import OpenAIServer, OurServer
from loadtest.peers import FORMS, MODES, Peer
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.routes import Completions
from loadtest.stage import Stage, palindrome
from loadtest.trace import Trace

Passes = Mapping[str, Sequence[list[Outcome]]]


def add_options(parser: ArgumentParser) -> None:
    """The options of ``compare``."""
    parser.add_argument("trace", type=Path, help="a trace that `python -m loadtest trace` made")
    parser.add_argument("--peer", action="append", required=True, metavar="PEER", help=f"{FORMS} (repeatable)")
    parser.add_argument(
        "--peer-fields",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a JSON file of further fields that peer NAME wants in a request's body, by model name (* for all)",
    )
    parser.add_argument("--paced", action="store_true", help="keep the trace's arrival times (default: a backlog)")
    parser.add_argument("--once", action="store_true", help="one pass each in place of A B B A")
    parser.add_argument("--batch-size", type=whole_from(1), default=16, help="rows of a batch in peft's loops")
    window = "waiting requests peft's loops may see (0: all)"
    parser.add_argument("--window", type=whole_from(0), default=0, help=window)


def run_parsed(stage: Stage, parsed: Namespace) -> Report:
    """Run ``compare`` as its options say."""
    fields = dict(_named_file(entry) for entry in parsed.peer_fields)
    peers = [
        read_peer(spec, stage, fields=fields, batch_size=parsed.batch_size, window=parsed.window)
        for spec in parsed.peer
    ]
    strangers = sorted(set(fields) - {peer.name for peer in peers})
    if strangers:
        raise ValueError(f"--peer-fields names {strangers[0]!r}, which is none of the peers")
    return run(Trace.load(parsed.trace), peers, paced=parsed.paced, once=parsed.once)


def _named_file(entry: str) -> tuple[str, dict[str, Any]]:
    name, _, path = entry.partition("=")
    try:
        fields = json.loads(Path(path).read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"--peer-fields {entry!r}: write NAME=FILE, a file of JSON ({problem})") from None
    if not isinstance(fields, dict) or not all(isinstance(body, dict) for body in fields.values()):
        raise ValueError(f'{path}: write fields by model name, for instance {{"*": {{"ignore_eos_token": true}}}}')
    return name, fields


def read_peer(
    spec: str, stage: Stage, *, fields: Mapping[str, dict[str, Any]], batch_size: int = 16, window: int = 0
) -> Peer:
    """The peer that a word of the command line names; ValueError if it names none."""
    kind, _, rest = spec.partition(":")
    if spec == "native":
        return OurServer(stage=stage, name=spec)
    if spec == "openai":
        return OurServer(stage=stage, name=spec, route=Completions())
    mode = next((mode for mode in MODES if mode == rest), None)
    if kind == "peft" and mode is not None:
        return PeftPeer(stage=stage, mode=mode, batch_size=batch_size, window=window)
    name, _, address = rest.partition("=")
    url, marked, base_model = address.partition("#")
    if kind == "openai" and name and url.startswith(("http://", "https://")):
        return OpenAIServer(
            stage=stage,
            name=name,
            url=url.rstrip("/"),
            base_model=base_model if marked else None,
            fields=fields.get(name, {}),
        )
    if kind == "llamacpp" and name and address.startswith(("http://", "https://")):
        return LlamaServer(stage=stage, name=name, url=address.rstrip("/"), fields=fields.get(name, {}).get("*", {}))
    raise ValueError(f"peer {spec!r} is not known; write {FORMS}")


def run(trace: Trace, peers: Sequence[Peer], *, paced: bool = False, once: bool = False) -> Report:
    """Prepare every peer, then play `trace` on each, there and back unless `once`."""
    names = [peer.name for peer in peers]
    if len(set(names)) < len(names):
        raise ValueError(f"two peers have one name among {', '.join(names)}; name each once")
    if not trace.requests:
        raise ValueError("the trace holds no requests")
    warnings = tuple(chain.from_iterable(peer.prepare(trace.adapters) for peer in peers))
    passes: dict[str, list[list[Outcome]]] = defaultdict(list)
    for peer in list(peers) if once else palindrome(list(peers)):
        passes[peer.name].append(peer.play(trace, paced=paced))
    return report(trace, passes, paced=paced, warnings=warnings)


def truth_of(names: Sequence[str]) -> str:
    """Whose answers the others' are held against."""
    return next((name for name in names if name.startswith("peft:")), names[0])


def tokens_per_s(outcomes: Sequence[Outcome]) -> float:
    """Tokens of complete answers over the time until the last of them was there."""
    whole = [outcome for outcome in outcomes if outcome.ok]
    return ratio(sum(len(one.token_times_s) for one in whole), max((one.end_s for one in whole), default=0.0))


def share_equal(found: Sequence[list[Outcome]], truth: Mapping[int, str]) -> float:
    """Of the answers in `truth`, the share that every pass of `found` gave too."""
    said = [{one.index: one.text for one in outcomes if one.ok} for outcomes in found]
    return ratio(sum(all(one.get(i) == text for one in said) for i, text in truth.items()), len(truth))


def report(trace: Trace, passes: Passes, *, paced: bool, warnings: Sequence[str] = ()) -> Report:
    """One row a peer, all its passes together; speeds are means over the passes."""
    names = tuple(passes)
    truth = truth_of(names)
    answers = {one.index: one.text for one in passes[truth][0] if one.ok}
    speed = {name: mean(map(tokens_per_s, passes[name])) for name in names}
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        played = [one for outcomes in passes[name] for one in outcomes]
        ttfts = [1e3 * one.ttft_s for one in played if one.ok and one.ttft_s is not None]
        tpots = [1e3 * one.tpot_s for one in played if one.ok and one.tpot_s is not None]
        figures = (percentile(ttfts, 50), percentile(ttfts, 99), percentile(tpots, 50), percentile(tpots, 99))
        failed = sum(not one.ok for one in played)
        rows.append((name, speed[name], *figures, failed, share_equal(passes[name], answers)))
    pace = "at its own pace" if paced else "all there from the start"
    return Report(
        name="compare",
        title=f"compare: {len(trace.requests)} requests over {len(trace.adapters)} adapters, {pace}",
        columns=(
            *("peer", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"),
            *("failed", f"answers equal to {truth}"),
        ),
        rows=tuple(rows),
        notes=(*_errors(passes), *warnings, *_unlike(rows, truth)),
        plot=Plot(
            title="The same trace on each",
            x_label="who answers",
            y_label="tokens/s",
            series={"tokens/s": tuple((float(at), speed[name]) for at, name in enumerate(names))},
            ticks=names,
        ),
        settings={"paced": paced, "truth": truth},
    )


def _errors(passes: Passes) -> list[str]:
    notes = []
    for name, found in passes.items():
        kinds: dict[str, int] = defaultdict(int)
        for one in chain.from_iterable(found):
            if one.error is not None:
                kinds[one.error] += 1
        if kinds:
            said = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
            notes.append(f"{name} failed: {said}")
    return notes


def _unlike(rows: Sequence[tuple[Cell, ...]], truth: str) -> list[str]:
    return [f"{row[0]}: {1 - float(row[-1]):.1%} of the answers differ from {truth}'s" for row in rows if row[-1] != 1]
