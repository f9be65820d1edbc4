"""Whether a base can be served here: its configuration, tokenizer and weights, and the memory it takes.

Reads configurations and the headers of weights, and builds the model without them; no weight is read and nothing is
downloaded. The last word has the self-check of a server that starts.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoTokenizer, PreTrainedModel

from peft_serve.commands.adapter_tables import size
from peft_serve.commands.checkup.finding import Finding, fine, odd, told, wrong
from peft_serve.commands.checkup.machine import Machine
from peft_serve.config import Settings
from peft_serve.model.families.registry import is_known
from peft_serve.model.loader import DEMO_NAMES, NotServable, locate, outline, resolve_device, resolve_dtype

_PATIENCE_S: Final = 20.0
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_POINTER: Final = b"version https://git-lfs.github.com/"
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")  # how torch.save has begun its files
_AGAIN: Final = "download it again, or copy it again from where it is whole"
_TOKENIZERS: Final = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model",
    "source.spm",
)  # fmt: skip
_BITS: Final = {"int8": 8, "fp8": 8, "bnb-nf4": 4, "bnb-int8": 8, "torchao-int8wo": 8}  # of a linear weight


def look_at_base(
    source: str,
    machine: Machine,
    settings: Settings,
    *,
    hub: Callable[[str], Any] | None = None,
    cached: Callable[[str], Path | None] | None = None,
) -> Iterator[Finding]:
    """Everything about a base short of loading it.

    `hub` gives a repository's facts as `HfApi.model_info` does, and `cached` the folder of one that was downloaded.
    """
    try:
        place = Path(locate(source))
    except NotServable as error:
        yield told("base", str(error))
        return
    in_cache = cached or partial(_in_cache, revision=settings.revision)
    folder = place if place.is_dir() else _downloaded(source, in_cache)
    if folder is None:
        yield from _on_the_hub(source, hub or partial(_model_info, revision=settings.revision))
    else:
        yield from _in_folder(source, folder, machine, settings)


def _downloaded(source: str, cached: Callable[[str], Path | None]) -> Path | None:
    """The hub's copy on this machine; one without weights counts only where no more can be fetched."""
    folder = cached(source) if _HUB_ID.fullmatch(source) else None
    has_weights = folder is not None and any(folder.glob("*.safetensors"))
    return folder if has_weights or constants.HF_HUB_OFFLINE else None


def _in_cache(source: str, *, revision: str | None) -> Path | None:
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, ValueError, HFValidationError):  # it is not there
        return None


def _in_folder(source: str, folder: Path, machine: Machine, settings: Settings) -> Iterator[Finding]:
    try:
        model = outline(str(folder))
    except NotServable as error:
        yield told("config.json", str(error))
        return
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        yield wrong("config.json", f"does not describe a model: {error}", "download it again, whole")
        return
    yield from _family(model)
    yield from _weights(folder)
    yield from _tokenizer(source, folder, model)
    yield from _context(model, settings)
    yield from _memory(model, machine, settings)


def _on_the_hub(source: str, hub: Callable[[str], Any]) -> Iterator[Finding]:
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        yield wrong("base", f"{source}: there is no such folder", f"check the path; or one of {', '.join(DEMO_NAMES)}")
        return
    if constants.HF_HUB_OFFLINE:
        fact = f"{source} is no folder, is not in the hub's cache, and HF_HUB_OFFLINE keeps the hub from being asked"
        yield wrong("base", fact, "unset HF_HUB_OFFLINE, or download it first: hf download")
        return
    try:
        info = hub(source)
    except GatedRepoError:
        yield wrong("base", f"{source} is gated on the hub", "accept its terms there, and set HF_TOKEN")
    except (RepositoryNotFoundError, HFValidationError):
        yield wrong(
            "base", f"{source} is neither a folder here nor a model on the hub", "check the name; private: HF_TOKEN"
        )
    except Exception as error:  # noqa: BLE001  # the hub's client lets those of its HTTP library through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield odd("base", f"{source} is no folder here, and the hub cannot be asked about it: {reason}", _NETWORK)
    else:
        yield from _repository(source, [each.rfilename for each in info.siblings or ()])


_NETWORK: Final = "check the name and the network; a proxy or a mirror: HTTPS_PROXY, HF_ENDPOINT"


def _model_info(source: str, *, revision: str | None) -> Any:
    return HfApi().model_info(source, revision=revision, timeout=_PATIENCE_S)


def _repository(source: str, files: list[str]) -> Iterator[Finding]:
    if "adapter_config.json" in files and "config.json" not in files:
        yield wrong("base", f"{source} is an adapter, not a base", "serve its base and upload the adapter")
    elif "config.json" not in files:
        yield wrong("base", f"{source} has no config.json", "name a repository in transformers' format")
    elif not any(name.endswith(".safetensors") for name in files):
        yield wrong("base", f"{source} has no safetensors; pickles are never read", _CONVERT)
    else:
        yield fine("base", f"{source} is on the hub, with {len(files)} files; download it for a closer look")


_CONVERT: Final = "save it with transformers: AutoModel...from_pretrained(..).save_pretrained(folder)"


def _family(model: PreTrainedModel) -> Iterator[Finding]:
    kind, name = model.config.model_type, type(model).__name__
    if is_known(kind):
        yield fine("family", f"{name}, of a kind that is tested ({kind})")
    else:
        yield odd(
            "family", f"{name}: {kind} is not among the kinds that are tested",
            "start it once: a server refuses a base whose rows differ from the model's own",
        )  # fmt: skip


def _weights(folder: Path) -> Iterator[Finding]:
    try:
        placed = _placed(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        yield wrong(_INDEX, f"cannot be read: {error}", "download the model again")
        return
    files = sorted(set(placed.values())) if placed else [_SINGLE]
    missing = [name for name in files if not (folder / name).is_file()]
    pickles = sorted(each.name for each in folder.glob("*.bin"))
    if missing and pickles:
        yield wrong(
            "weights", f"are pickles ({pickles[0]}), whose reading can run code; safetensors are read", _CONVERT
        )
        return
    if missing:
        what = f"{len(missing)} of {len(files)} files are missing, {missing[0]} first"
        yield wrong("weights", what, "download the model again; an interrupted download leaves such gaps")
    held: set[str] = set()
    for name in [name for name in files if name not in missing]:
        problem, names = _header(folder / name)
        held |= names
        if problem:
            yield wrong(name, problem[0], problem[1])
            return
    if missing:
        return
    absent = sorted(placed.keys() - held)
    if absent:
        yield wrong(
            "weights", f"{len(absent)} that the index names are in no file, {absent[0]} first", "download again"
        )
    else:
        yield fine("weights", f"{len(held)} tensors in {len(files)} files, whole")


def _placed(folder: Path) -> Mapping[str, str]:
    """The file of each weight, as the index says; empty without one."""
    if not (folder / _INDEX).is_file():
        return {}
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return {str(weight): str(file) for weight, file in index["weight_map"].items()}


def _header(path: Path) -> tuple[tuple[str, str] | None, set[str]]:
    """What is wrong with a safetensors file, and the tensors its header names. The values are not read."""
    total = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if _POINTER.startswith(head) and head:
            return (("is a git-lfs pointer, not the file", "run `git lfs pull`")), set()
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if head.startswith(_PICKLES):
            return (("is no safetensors file but a pickle under its name", _CONVERT)), set()
        if not 2 <= length <= min(total - 8, 100 << 20):
            return ((f"has {size(total)} that are no safetensors file: it is damaged or cut short", _AGAIN)), set()
        try:
            fields = json.loads(file.read(length))
            fields.pop("__metadata__", None)
            end = max((int(each["data_offsets"][1]) for each in fields.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return (("has a header that cannot be read", "download it again")), set()
    if total != 8 + length + end:
        fact = f"has {size(total)} and its header describes {size(8 + length + end)}: it is cut short or damaged"
        return ((fact, "download it again")), set()
    return None, set(fields)


def _tokenizer(source: str, folder: Path, model: PreTrainedModel) -> Iterator[Finding]:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield wrong(
            "tokenizer", f"{source} has none", "save it beside the model: AutoTokenizer...save_pretrained(folder)"
        )
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # tokenizers raise whatever their parsers do
        yield wrong("tokenizer", f"cannot be read: {str(error).strip().splitlines()[0]}", "save it again")
        return
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        yield odd(
            "tokenizer", f"has {len(tokenizer)} tokens and the embedding {rows} rows; prompts with others are refused",
            "serve the tokenizer that was saved with these weights",
        )  # fmt: skip
    else:
        yield fine("tokenizer", f"{len(tokenizer)} tokens")


def _context(model: PreTrainedModel, settings: Settings) -> Iterator[Finding]:
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(own, int) and settings.max_model_len is not None and settings.max_model_len > own:
        yield odd(
            "--max-model-len", f"{settings.max_model_len} is beyond the {own} positions of the base",
            "leave the option out, unless the base is made for more",
        )  # fmt: skip


def _memory(model: PreTrainedModel, machine: Machine, settings: Settings) -> Iterator[Finding]:
    try:
        device = resolve_device(settings.device)
        dtype = resolve_dtype(settings.dtype, device)
    except NotServable as error:
        yield told("--device", str(error))
        return
    num = sum(parameter.numel() for parameter in model.parameters())
    bits = _BITS.get(settings.quantisation or "", 8 * dtype.itemsize)
    needed = num * bits // 8
    what = f"{num / 1e6:.1f} M parameters take {size(needed)} in {str(dtype).removeprefix('torch.')}"
    free = machine.free_memory() if device.type == "cpu" else None
    if free is not None and needed > free:
        way = "take a smaller base, --dtype bfloat16, or --quantisation"
        yield wrong("memory", f"{what}; {size(free)} are free", way)
    else:
        yield fine("memory", what + ("" if free is None else f"; {size(free)} are free"))
