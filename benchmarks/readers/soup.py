"""Mix readers of one family: `python benchmarks/readers/soup.py FOLDER FOLDER --shares 0.3 0.7 --out FOLDER`.

The mean of the weights of runs that began alike may do better than each of them (model soups, Wortsman et al.
2022, arXiv 2203.05482): what one run has gained and another lost comes together. Shares are chosen on the
validation split, as everything else is.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from readers import attention, card, states, train  # noqa: E402

WEIGHTS = "model.safetensors"
ITEMS = 480  # of each kind of picture: ten times what a run looks at every time, and asks some twenty words


def mix(folders: Sequence[Path], shares: Sequence[float], out: Path) -> None:
    """Write a checkpoint whose weights are the sum of these folders' weights times these shares.

    All else in it is the last folder's; its `training.json` says what was mixed.
    """
    tensors = [load_file(folder / WEIGHTS) for folder in folders]
    shapes = [{name: x.shape for name, x in own.items()} for own in tensors]
    if any(own != shapes[0] for own in shapes):
        raise SystemExit(
            f"{', '.join(map(str, folders))} hold weights of different shapes: give readers of one family"
        )
    shutil.copytree(folders[-1], out)
    mixed = {
        name: sum(share * own[name].float() for share, own in zip(shares, tensors, strict=True)).to(x.dtype)
        for name, x in tensors[0].items()
    }
    save_file(mixed, out / WEIGHTS, {"format": "pt"})
    noted = json.loads((out / "training.json").read_text())
    said = (f"{s:g} of {f} (weights {states.fingerprint(f)})" for s, f in zip(shares, folders, strict=True))
    (out / "training.json").write_text(json.dumps(noted | {"mixed": ", ".join(said)}, indent=2) + "\n")


def validate(out: Path, items: int) -> None:
    """Add the mixture's own scores, on so many items of each kind, to `training.csv`, and write its card."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, use_safetensors=True
    )
    attention.use(model)
    scores = train.validate(model.eval(), transformers.AutoProcessor.from_pretrained(out), items=items)
    with (out / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows.append(rows[-1] | {"loss": "", "right": ""} | scores)
    with (out / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    card.write(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="readers of one family, two or more")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="of each, 1 in all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the mixture, not there yet")
    parser.add_argument("--items", type=int, default=ITEMS, help="pictures of each kind to validate with")
    options = parser.parse_args()
    folders, shares, out = options.folders, options.shares, options.out
    if not 2 <= len(folders) == len(shares) or abs(sum(shares) - 1) > 1e-6:
        parser.error(
            f"{len(folders)} readers and shares {shares}: give two readers or more, each a share, 1 in all"
        )
    if out.exists():
        parser.error(f"{out} is there already: give another --out, or delete it")
    mix(folders, shares, out)
    validate(out, options.items)


if __name__ == "__main__":
    main()
