"""Write the README card of every shipped adapter from its recipe and its result file.

    python adapters/recipes/cards.py

The figures stand between two markers, so that `evaluate.py --write-cards` can replace them by what a
running server answered. Figures come from `results/`, wordings from `tasks.py`: nothing is typed in twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baselines import Figures
from tasks import NO_LICENCE, RECIPES, TASKS, Recipe, Task

ADAPTERS = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"

METHODS = {
    "lora": "LoRA of rank 8 on all seven linear layers of every block",
    "ia3": "IA3 (learned scales on keys, values and the feed-forward's inside)",
    "prompt": "Prompt tuning with 20 virtual tokens",
}
TRIES = {
    "twitter-complaints": (
        "@AcmeAir why is my bag still not here? I am so annoyed",
        "@AcmeAir thank you, lovely flight!",
    ),
    "sms-spam": (
        "You have won! To claim your prize call 09098790123 now",
        "running late, save me a seat",
    ),
    "trec": ("Who built the first lighthouse ?", "How many people live in Utrecht ?"),
    "subj": (
        "the plot limps along and the jokes never land .",
        "a young baker inherits a lighthouse and a debt .",
    ),
    "sst2": ("a warm and clever little film .", "two hours i will never get back ."),
    "banking77": ("My new card still is not here", "How do I change my PIN?"),
}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def verdict(adapter: Figures, tfidf: Figures) -> str:
    """One honest sentence about the comparison that matters."""
    gap = 100 * (adapter.accuracy - tfidf.accuracy)
    if gap > 0:
        return f"Above TF-IDF by {gap:.1f} points of accuracy."
    return f"TF-IDF with logistic regression is better by {-gap:.1f} points of accuracy; see *Limits*."


def figures_block(how: str, adapter: Figures, majority: Figures, tfidf: Figures) -> str:
    """The table of figures, markers included."""
    lines = [
        START,
        f"| {adapter.rows} held-out rows | accuracy | macro-F1 |",
        "|---|---|---|",
        f"| this adapter, {how} | {percent(adapter.accuracy)} | {percent(adapter.macro_f1)} |",
        f"| TF-IDF (1-2) + logistic regression | {percent(tfidf.accuracy)} | {percent(tfidf.macro_f1)} |",
        f"| always the commonest label | {percent(majority.accuracy)} | {percent(majority.macro_f1)} |",
        "",
        verdict(adapter, tfidf),
        END,
    ]
    return "\n".join(lines)


def with_block(card: str, block: str) -> str:
    """`card` with what stands between the markers replaced."""
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError("the card has no figures block")
    return before + block + after


def table_row(recipe: Recipe, adapter: Figures, majority: Figures, tfidf: Figures) -> str:
    """One adapter's line in `adapters/README.md`: accuracy / macro-F1 of it and of its yardsticks."""
    pairs = (f"{percent(it.accuracy)} / {percent(it.macro_f1)}" for it in (adapter, tfidf, majority))
    name = f"[{recipe.adapter}]({recipe.base}/{recipe.adapter}/)"
    return f"| {name} | {METHODS[recipe.method].split(' ')[0]} | {adapter.rows} | {' | '.join(pairs)} |"


def with_row(table: str, row: str) -> str:
    """`table` with the line of the same adapter replaced by `row`."""
    name = row.split(" | ")[0]
    lines = [row if line.startswith(name + " ") else line for line in table.split("\n")]
    if row not in lines:
        raise ValueError(f"adapters/README.md has no line that begins with {name!r}")
    return "\n".join(lines)


def figures_of(record: dict[str, Any]) -> Figures:
    return Figures(accuracy=record["accuracy"], macro_f1=record["macro_f1"], rows=record["rows"])


def read_baselines(task: Task) -> tuple[Figures, Figures]:
    """Majority and TF-IDF of `task`, as `baselines.py` left them."""
    record = json.loads((RESULTS / "baselines.json").read_text(encoding="utf-8"))[task.name]
    return figures_of(record["majority"]), figures_of(record["tfidf"])


def front_matter(base: str, task: Task) -> str:
    return "\n".join(
        (
            "---",
            f"base_model: peft-serve/{base}",
            "library_name: peft",
            "pipeline_tag: text-classification",
            f"language: {task.language}",
            f"license: {'other' if task.licence == NO_LICENCE else 'apache-2.0'}",
            "---",
        )
    )


def data_section(task: Task) -> str:
    licence = f"licence of the data: {task.licence}"
    if task.licence == NO_LICENCE:
        licence = "the authors state no licence, so no row is shipped and the weights are for demonstration"
    return (
        f"`{task.repository}` on GitHub at commit `{task.commit[:12]}`; {licence}. Split: {task.splits}.\n"
        "`adapters/recipes/sources.py` fetches and converts it; nothing of it is in this repository."
    )


def words_section(recipe: Recipe, task: Task) -> str:
    wording = task.wordings[recipe.wording]
    lines = [f"Asked as `{wording.template}`; the answer is the label whose words get the highest summed"]
    lines.append("log-probability. `peft_serve.json` tells the server, so a request sends the bare text.")
    if any(label != words for label, words in wording.choices.items()):
        said = ", ".join(f"{label} = *{words}*" for label, words in wording.choices.items())
        lines.append(f"Words the base already knew from pre-training stand for the labels: {said}.")
    return "\n".join(lines)


def training_section(recipe: Recipe, record: dict[str, Any]) -> str:
    if "settings" not in record:
        return str(record["how"])
    it, fit = record["settings"], record["fit"]
    flags = f"--method {recipe.method} --epochs {it['epochs']:g} --seed {it['seed']}"
    flags += f" --validations {it['validations']} --max-validation-rows {it['max_validation_rows']}"
    if recipe.method == "lora":
        flags += f" --dropout {it['dropout']:g}"
    if it["num_averaged"] > 1:
        flags += f" --num-averaged {it['num_averaged']}"
    if recipe.wording != "plain" and recipe.method == "lora":
        flags += f" --wording {recipe.wording}"
    return (
        f"{METHODS[recipe.method]}: {record['trainable_parameters']:,} parameters. {fit['steps']} steps of "
        f"{it['batch_rows']} rows, AdamW at {it['learning_rate']:g},\nbest of {len(fit['curve'])} validation "
        f"checkpoints (step {fit['best_step']}), {fit['cpu_s']:.0f} CPU seconds on one core. Again with\n\n"
        f"```\npython adapters/recipes/train_adapter.py {recipe.task} \\\n    {flags} \\\n"
        "    --base server/peft_serve/demo/demo-llama --data DATA --out OUT\n```"
    )


def card(recipe: Recipe) -> str:
    """The whole README of one adapter."""
    task = TASKS[recipe.task]
    record = read_result(recipe)
    block = figures_block("offline, fp32", figures_of(record["test"]), *read_baselines(task))
    labels = ", ".join(task.labels) if len(task.labels) < 10 else f"{len(task.labels)} intents"
    curl = json.dumps({"inputs": list(TRIES[recipe.task])})
    return f"""{front_matter(recipe.base, task)}

# {recipe.adapter} on {recipe.base}

{task.title} Labels: {labels}. Fitted with PEFT: {METHODS[recipe.method]}.

## Figures

{block}

## Use

```
curl 'http://localhost:8000/generate?adapter={recipe.adapter}' -H 'content-type: application/json' \\
  -d '{curl.replace("'", "")}'
```

{words_section(recipe, task)} The examples are invented, and easy.

## Training

{training_section(recipe, record)}

## Data

{data_section(task)}

## Limits

A demonstration of serving, not a classifier to rely on. The base has about 6 million parameters and was
pre-trained for minutes on a CPU: it knows words, hardly grammar, and nothing of the world. English only, and
only texts like those it was fitted on. One run, one seed. Free text written with this adapter on is not meant
to be read.
"""


def read_result(recipe: Recipe) -> dict[str, Any]:
    """What `train_adapter.py` left about one adapter."""
    record: dict[str, Any] = json.loads((RESULTS / recipe.base / f"{recipe.adapter}.json").read_text(encoding="utf-8"))
    return record


def main() -> None:
    overview = ADAPTERS / "README.md"
    table = overview.read_text(encoding="utf-8")
    for (base, name), recipe in RECIPES.items():
        measured = figures_of(read_result(recipe)["test"])
        table = with_row(table, table_row(recipe, measured, *read_baselines(TASKS[recipe.task])))
        (ADAPTERS / base / name / "README.md").write_text(card(recipe), encoding="utf-8")
        print(f"{base}/{name}")
    overview.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
