"""Fit one adapter on a frozen base for one task, and say how good it is on held-out rows.

    python adapters/recipes/train_adapter.py trec --method lora \\
        --base server/peft_serve/demo/demo-llama --data DATA --out adapters/demo-llama/trec

DATA is a folder with the task's JSON lines (`sources.py` makes it). OUT becomes a PEFT checkpoint folder with
a `peft_serve.json`; the figures and settings go to `--result`. The test split is looked at once, at the end,
with the weights as they were saved (after the cast to bf16).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from answering import MAX_TRAIN_TEXT_TOKENS, AnswerModel, load_adapted, load_base, predict
from peft import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save
from sklearn.metrics import accuracy_score, f1_score
from tasks import TASKS, Row, Task, Wording, rows_by_split, serve_file
from tqdm import tqdm

LEARNING_RATES = {"lora": 3e-3, "ia3": 2e-2, "prompt": 3e-2}
DEFAULT_WORDING = {"lora": "plain", "ia3": "emotion", "prompt": "emotion"}
WARMUP_STEPS = 30
BUCKET_BATCHES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides what is trained, apart from the rows."""

    task: str
    wording: str
    method: str
    epochs: float
    learning_rate: float
    batch_rows: int
    rank: int
    dropout: float
    virtual_tokens: int
    seed: int
    precision: str
    validations: int
    max_validation_rows: int
    num_averaged: int


@dataclass(slots=True)
class Fit:
    """What came out of the training loop."""

    steps: int = 0
    best_step: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def peft_config(settings: Settings, base: Any, name: str) -> PeftConfig:
    """The PEFT configuration of the method, for a Llama-like decoder or a T5-like encoder-decoder."""
    seq2seq = base.config.is_encoder_decoder
    kind = TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM
    attention = ["q", "k", "v", "o"] if seq2seq else ["q_proj", "k_proj", "v_proj", "o_proj"]
    feedforward = ["wi_0", "wi_1", "wo"] if seq2seq else ["gate_proj", "up_proj", "down_proj"]
    if settings.method == "lora":
        return LoraConfig(
            task_type=kind,
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            lora_dropout=settings.dropout,
            target_modules=attention + feedforward,
        )
    if settings.method == "ia3":
        return IA3Config(
            task_type=kind,
            target_modules=[*attention[1:3], feedforward[-1]],
            feedforward_modules=[feedforward[-1]],
        )
    return PromptTuningConfig(task_type=kind, num_virtual_tokens=settings.virtual_tokens, tokenizer_name_or_path=name)


def start_prompt_at_real_tokens(model: Any, base: Any) -> None:
    """Soft prompts begin as embeddings of random frequent tokens, which the layers know better than noise."""
    table = base.get_input_embeddings().weight
    frequent = 300 + torch.randperm(2000)
    with torch.no_grad():
        for encoder in model.prompt_encoder.values():
            encoder.embedding.weight.copy_(table[frequent[: encoder.embedding.weight.shape[0]]])


def adapted(settings: Settings, base: Any, name: str) -> Any:
    """A PEFT model of the base in which only the adapter is trainable."""
    model = get_peft_model(base, peft_config(settings, base, name))
    if settings.method == "prompt":
        start_prompt_at_real_tokens(model, base)
    return model


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised row: the prompt around its text, and the answer that ends with end-of-sequence."""

    prompt: list[int]
    answer: list[int]


def examples_of(asked: AnswerModel, rows: list[Row]) -> list[Example]:
    end = asked.tokenizer.eos_token_id
    return [
        Example(
            asked.prompt_ids(row.text, MAX_TRAIN_TEXT_TOKENS),
            [*asked.answer_ids(asked.wording.choices[row.label]), end],
        )
        for row in rows
    ]


def endless_batches(examples: list[Example], batch_rows: int, rng: random.Random) -> Iterator[list[Example]]:
    """Shuffled batches of rows of similar length, epoch after epoch."""
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order), batch_rows * BUCKET_BATCHES):
            bucket = sorted(order[start : start + batch_rows * BUCKET_BATCHES], key=lambda e: len(e.prompt))
            batches = [bucket[i : i + batch_rows] for i in range(0, len(bucket), batch_rows)]
            yield from rng.sample(batches, len(batches))


class AdapterFit:
    """The training loop of one adapter: linear warm-up, linear decay, best validation checkpoints kept."""

    def __init__(self, asked: AnswerModel, settings: Settings, splits: dict[str, list[Row]]) -> None:
        self.asked = asked
        self.settings = settings
        self.rng = random.Random(settings.seed)
        self.examples = examples_of(asked, splits["train"])
        self.validation = splits["validation"][: settings.max_validation_rows]
        self.parameters = [p for p in asked.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.01)
        self.total_steps = max(1, round(settings.epochs * len(self.examples) / settings.batch_rows))
        self.kept: list[tuple[tuple[float, float], int, list[torch.Tensor]]] = []

    def run(self) -> Fit:
        fit = Fit(steps=self.total_steps)
        began, began_cpu = time.monotonic(), time.process_time()
        every = max(1, self.total_steps // self.settings.validations)
        batches = endless_batches(self.examples, self.settings.batch_rows, self.rng)
        bar = tqdm(range(1, self.total_steps + 1), desc=self.settings.task, unit="step", mininterval=5.0)
        for step in bar:
            loss = self._step(next(batches), step)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if step % every == 0 or step == self.total_steps:
                fit.curve.append(self._validate(step, loss))
                bar.write(json.dumps(fit.curve[-1]))
        fit.best_step = self._restore_best()
        fit.cpu_s = round(time.process_time() - began_cpu, 1)
        fit.wall_s = round(time.monotonic() - began, 1)
        return fit

    def _step(self, batch: list[Example], step: int) -> float:
        left = 1 - (step - 1) / self.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1.0, step / WARMUP_STEPS) * left
        self.asked.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16"):
            loss = self.asked.loss([e.prompt for e in batch], [e.answer for e in batch])
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _validate(self, step: int, loss: float) -> dict[str, float]:
        answers, nll = predict(self.asked, self.validation)
        accuracy = accuracy_score([row.label for row in self.validation], answers)
        self.kept.append(((accuracy, -nll), step, [p.detach().clone() for p in self.parameters]))
        self.kept.sort(key=lambda kept: kept[0], reverse=True)
        del self.kept[max(1, self.settings.num_averaged) :]
        return {"step": step, "loss": round(loss, 4), "accuracy": round(accuracy, 4), "nll": round(nll, 4)}

    def _restore_best(self) -> int:
        """Put back the best checkpoint, or the mean of the best few; the step of the best one."""
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(torch.stack([tensors[i] for _, _, tensors in self.kept]).mean(0))
        return self.kept[0][1]


def save_adapter(model: Any, out: Path, base_name: str, wording: Wording, max_new_tokens: int) -> None:
    """A PEFT checkpoint folder that names the public base, LoRA in bf16, with its `peft_serve.json`."""
    model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty card; cards.py writes a true one
    finish_checkpoint(out, base_name)
    text = json.dumps(serve_file(wording, max_new_tokens), indent=2)
    (out / "peft_serve.json").write_text(text + "\n", encoding="utf-8")


def finish_checkpoint(out: Path, base_name: str) -> None:
    """Make a saved checkpoint shippable: public base name, stable order of modules, LoRA factors in bf16."""
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    if "tokenizer_name_or_path" in config:
        config["tokenizer_name_or_path"] = base_name
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = out / "adapter_model.safetensors"
    tensors = load_file(weights)
    if config["peft_type"] == "LORA":
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))


def score_checkpoint(base: str, out: Path, wording: Wording, rows: list[Row]) -> dict[str, float]:
    """Held-out figures of a checkpoint as it lies on disk, uncut texts, fp32."""
    model, tokenizer = load_adapted(base, out)
    answers, nll = predict(AnswerModel.of(model, tokenizer, wording), rows)
    truth = [row.label for row in rows]
    return {
        "accuracy": round(float(accuracy_score(truth, answers)), 4),
        "macro_f1": round(float(f1_score(truth, answers, average="macro")), 4),
        "nll": round(nll, 4),
        "rows": len(rows),
    }


def train(task: Task, settings: Settings, base_path: str, base_name: str, data: Path, out: Path) -> dict[str, Any]:
    """Fit, save, score; the record that goes to the result file."""
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    wording = task.wordings[settings.wording]
    splits = rows_by_split(task, data)
    base, tokenizer = load_base(base_path)
    model = adapted(settings, base, base_name)
    asked = AnswerModel.of(model, tokenizer, wording)
    fit = AdapterFit(asked, settings, splits).run()
    save_adapter(model, out, base_name, wording, max(map(len, asked.choices)) + 1)
    return {
        "adapter": out.name,
        "base": base_name,
        "settings": asdict(settings),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rows": {split: len(rows) for split, rows in splits.items()},
        "fit": asdict(fit),
        "test": score_checkpoint(base_path, out, wording, splits["test"]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("task", choices=sorted(TASKS))
    it.add_argument("--method", choices=sorted(LEARNING_RATES), default="lora")
    it.add_argument("--wording", help="a wording of the task (default: plain for lora, else emotion, if it has it)")
    it.add_argument("--base", required=True, help="folder or hub name of the frozen base")
    it.add_argument("--base-name", help="the base's public name, kept in the adapter (default: peft-serve/<folder>)")
    it.add_argument("--data", type=Path, required=True, help="folder with the JSON lines")
    it.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    it.add_argument("--result", type=Path, help="JSON file for settings and figures (default: OUT.result.json)")
    it.add_argument("--epochs", type=float, default=5.0)
    it.add_argument("--learning-rate", type=float, help="default: by method")
    it.add_argument("--batch-rows", type=int, default=32)
    it.add_argument("--rank", type=int, default=8)
    it.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout")
    it.add_argument("--virtual-tokens", type=int, default=20)
    it.add_argument("--seed", type=int, default=0)
    it.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="of training; scoring is fp32")
    it.add_argument("--validations", type=int, default=10, help="how often to look at the validation split")
    it.add_argument("--max-validation-rows", type=int, default=500)
    it.add_argument("--num-averaged", type=int, default=1, help="average the best N validation checkpoints")
    it.add_argument("--threads", type=int, default=1)
    return it


def settings_of(options: argparse.Namespace) -> Settings:
    task = TASKS[options.task]
    preferred = DEFAULT_WORDING[options.method]
    wording = options.wording or (preferred if preferred in task.wordings else next(iter(task.wordings)))
    if wording not in task.wordings:
        raise SystemExit(f"{task.name} has no wording {wording!r}; it has {', '.join(task.wordings)}")
    named = {name: getattr(options, name) for name in Settings.__dataclass_fields__ if hasattr(options, name)}
    rate = options.learning_rate or LEARNING_RATES[options.method]
    return Settings(**{**named, "wording": wording, "learning_rate": rate})


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    base_name = options.base_name or f"peft-serve/{Path(options.base).name}"
    result = options.result or options.out.with_name(options.out.name + ".result.json")
    task = TASKS[options.task]
    record = train(task, settings_of(options), options.base, base_name, options.data, options.out)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["test"]), f"fit: {record['fit']['cpu_s']} CPU s")


if __name__ == "__main__":
    main()
