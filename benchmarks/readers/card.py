"""What lies beside a reader's weights: its card, and the curves of its training, made from what was noted.

`python benchmarks/readers/card.py checkpoints/qwen2_5_vl` makes both anew.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "illava"  # names in the file follow from the curves alone

TITLES = {"qwen2_5_vl": "Qwen2.5-VL", "internvl": "InternVL"}
UNFINISHED = """
**Its training is not finished**: some of the tasks below are still at chance, and say nothing about merging.
"""
# What is worth knowing of a family's videos and pictures.
VIDEO = {
    "qwen2_5_vl": (
        "; not on transformers\n4.57, which rounds the time between frames down to whole seconds, "
        "so that these are all at once"
    ),
    "internvl": "",
}
PICTURES = {
    "qwen2_5_vl": "",
    "internvl": """
**Pictures** are cut into tiles of 96 x 96 pixels, 36 tokens each: a square one of up to 135 pixels a side is
brought to one tile, a larger one is four tiles and a thumbnail. So 128 pixels are shrunk, and the writing in
them is smaller than in all others.
""",
}
WEAK_BELOW = 0.8
WEAK = """
**What it has not learnt** (under {below:.0%} right, by pixels of a picture's side); what a method keeps of
these says little:

{weak}
"""
CARD = """\
# A small {title} that sees

A genuine `{kind}` of {millions:.1f} M parameters, trained from {began} to answer simple questions
about drawn pictures, so that the accuracy of merging visual tokens can be measured without a download.

    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained("checkpoints/{name}")
    processor = AutoProcessor.from_pretrained("checkpoints/{name}")
{state}
**What it is evidence of.** That a way of removing visual tokens keeps, or loses, what a model of this
architecture needs for its answers. It is no evidence about the checkpoints people use: it is a thousandth of
their size, knows some sixty words, and has seen nothing but these pictures.

**Questions it answers** (one a prompt, lower case, after the picture):
`which digit is red ?` · `what is left of the red digit ?` (`right of`, `above`, `below`) ·
`how many red digits are there ?` (`digits`, `circles`, ...) · `what is written ?` ·
`in which picture is the red digit ?` · `in which order did the digits appear ?` (a video{video}).
{pictures}
**Data.** scikit-learn's handwritten digits, photographs of scikit-learn, scikit-image and matplotlib, and
matplotlib's fonts, drawn by `benchmarks/readers/scenes.py`. Digits, photographs, fonts and strings of
validation and test are not among those of training.

**Recipe.** `benchmarks/readers/train.py`: AdamW and Muon, bfloat16 autocast, an average of the weights; the
encoder first learns to name what each visual token looks at, then the whole model learns to answer, from few
things in small pictures to everything at every size.

| | |
|---|---|
{facts}

**Validation** when these weights were saved (exact answers, greedy, by task and pixels of a picture's side):

| task | right |
|---|---:|
{scores}

![curves](training.svg)

Results on the test split, unpatched and merged, are in the project's README. The weights have the project's
licence; photographs and fonts keep those of the packages that ship them.
"""


def weak_tasks(right: dict[str, float]) -> list[str]:
    """A line for each task that is weak at some size of picture, the smallest first.

    Args:
        right: share of right answers by task and size, as `"count 96"`.
    """
    weak: dict[str, dict[int, float]] = {}
    for name, share in right.items():
        task, size = name.rsplit(" ", 1)
        if share < WEAK_BELOW:
            weak.setdefault(task, {})[int(size)] = share
    return [
        f"- {task}: {', '.join(f'{size} px ({share:.1%})' for size, share in sorted(of.items()))}"
        for task, of in sorted(weak.items())
    ]


def _began(source: str, name: str) -> str:
    if source == "random weights":
        return source
    begun, language = "random weights", ""
    for part in source.split("; "):
        folder, weights = part.split(", weights ")
        if Path(folder).name == name:
            begun = f"an earlier reader's\nweights (`{weights}`)"
        else:
            language = f", its language\nmodel from that of `{folder}` (weights `{weights}`)"
    return f"{begun}{language},"


def write(folder: Path) -> None:
    """Write `README.md` and `training.svg` from a checkpoint's config, `training.json` and `training.csv`."""
    with (folder / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    config = json.loads((folder / "config.json").read_text())
    noted = json.loads((folder / "training.json").read_text())
    last = rows[-1]
    tasks = [name for name in last if " " in name]
    asked = int(noted.pop("steps asked for"))
    facts = {"steps": f"{int(last['step']):,} of {asked:,}", "hours": last["hours"], **noted}
    unfinished = int(last["step"]) < asked
    state = UNFINISHED if unfinished else ""
    if weak := weak_tasks({name: float(last[name]) for name in tasks}):
        state += WEAK.format(below=WEAK_BELOW, weak="\n".join(weak))
    card = CARD.format(
        title=TITLES[config["model_type"]],
        kind=config["architectures"][0],
        name=folder.name,
        state=state,
        began=_began(noted["began from"], folder.name),
        video=VIDEO[config["model_type"]],
        pictures=PICTURES[config["model_type"]],
        millions=facts.pop("parameters") / 1e6,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        scores="\n".join(f"| {name} | {100 * float(last[name]):.1f} % |" for name in tasks),
    )
    (folder / "README.md").write_text(card)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in tasks:
        size = name.rsplit(" ", 1)[1]
        style = {"96": ":", "128": "--"}.get(size, "-")
        color = f"C{sorted({t.split()[0] for t in tasks}).index(name.split()[0])}"
        steps, shares = [int(row["step"]) for row in rows], [100 * float(row[name]) for row in rows]
        axes.plot(steps, shares, style, color=color, label=name)
    axes.set(xlabel="step", ylabel="exact answers on validation pictures, %", ylim=(0, 100))
    axes.legend(fontsize="small", ncols=3)
    figure.savefig(folder / "training.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
