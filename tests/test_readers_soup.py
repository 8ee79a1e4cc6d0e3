"""The mean of readers' weights."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from readers import architectures, soup, states, train
from readers.tasks import WORDS

READER = Path(__file__).resolve().parent.parent / "checkpoints" / "internvl"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three untrained readers, the last of the other family."""
    made = []
    for seed, family in ((3, "internvl"), (4, "internvl"), (5, "qwen2_5_vl")):
        folder = tmp_path_factory.mktemp("readers") / family
        model, processor = architectures.build(family, WORDS, seed=seed)
        architectures.save(model, processor, folder)
        (folder / "training.json").write_text(json.dumps({"seed": seed}))
        made.append(folder)
    return made


def test_weights_are_summed_by_their_shares(folders, tmp_path):
    one, two, _ = folders
    soup.mix([one, two], [0.25, 0.75], out := tmp_path / "mixed")
    first, second, mixed = (load_file(folder / soup.WEIGHTS) for folder in (one, two, out))
    assert mixed.keys() == first.keys()
    for name, weight in mixed.items():
        assert weight.dtype == first[name].dtype == torch.bfloat16
        expected = first[name].float() * 0.25 + second[name].float() * 0.75
        assert torch.allclose(weight.float(), expected, rtol=1e-2, atol=1e-6), name
    said = json.loads((out / "training.json").read_text())
    names = [f"{folder} (weights {states.fingerprint(folder)})" for folder in (one, two)]
    assert said == {"seed": 4, "mixed": f"0.25 of {names[0]}, 0.75 of {names[1]}"}
    assert {path.name for path in out.iterdir()} == {path.name for path in two.iterdir()}


def test_readers_of_two_families_do_not_mix(folders, tmp_path):
    with pytest.raises(SystemExit, match="hold weights of different shapes: give readers of one family"):
        soup.mix(folders[1:], [0.5, 0.5], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("shares", [["1"], ["0.5", "0.4"], ["0.5", "0.25", "0.25"]])
def test_shares_are_one_for_each_and_one_in_all(shares, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soup.py", "a", "b", "--shares", *shares, "--out", "c"])
    with pytest.raises(SystemExit):
        soup.main()
    assert "give two readers or more, each a share, 1 in all" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten(tmp_path, monkeypatch, capsys):
    given = ["soup.py", "a", "b", "--shares", "0.5", "0.5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        soup.main()
    assert "is there already: give another --out, or delete it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_mixed_with_itself_is_itself_and_scores_as_it_did(tmp_path, monkeypatch):
    out = tmp_path / "mixed"
    given = ["soup.py", str(READER), str(READER), "--shares", "0.5", "0.5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*given, "--items", "48"])
    soup.main()
    assert states.fingerprint(out) == states.fingerprint(READER)
    before, after = (list(csv.DictReader((folder / "training.csv").open())) for folder in (READER, out))
    assert len(after) == len(before) + 1
    model = transformers.AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval()
    scores = train.validate(model, transformers.AutoProcessor.from_pretrained(READER), items=48)
    assert {name: float(share) for name, share in after[-1].items() if " " in name} == pytest.approx(
        scores,
        abs=0.06,  # a word of nineteen
    )
    assert "0.5 of" in (out / "README.md").read_text()
