"""docs/add_a_family.md as a reader follows it: its blocks in their order, in one namespace."""

import re
from pathlib import Path

import pytest

import illava
from illava import families

PAGE = Path(__file__).parent.parent / "docs" / "add_a_family.md"


def blocks():
    """The code of each, behind as many empty lines as stand above it: errors name the lines of the page."""
    text = PAGE.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, found.start(1)) + found[1]


def test_the_page_can_be_followed_from_beginning_to_end(monkeypatch, capsys):
    assert "llava" not in illava.supported_models(), "the page adds what is there; take another family"
    monkeypatch.setattr(families, "_FILES", dict(families._FILES))
    names = {"__name__": "add_a_family"}
    for code in blocks():
        exec(compile(code, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "LlavaForConditionalGeneration (model_type 'llava') is not supported; illava knows" in said
    assert "128 visual tokens to 32 (75.0% gone)" in said
    assert names["merged"].shape[1] == names["prompt"].shape[1] + 4
    monkeypatch.undo()
    with pytest.raises(illava.UnsupportedModelError):
        illava.patch(names["model"])
