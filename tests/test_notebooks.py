"""The notebooks as a reader runs them, top to bottom in a kernel of their own: `pytest -m slow`."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MOST_BYTES = 400_000
# What the last cells of each put out.
LAST = {"quickstart": "image/jpeg", "choose_a_plan": '"reduction": '}
# What is made smaller for the test, each as it stands there and what it becomes.
SMALLER = {"quickstart": {}, "choose_a_plan": {"PICTURES = 12": "PICTURES = 4"}}

nbformat = pytest.importorskip("nbformat", reason='notebooks are read with nbformat: pip install ".[test]"')


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def put_out(cells) -> str:
    """Texts of all outputs, and the kinds of those that are none."""
    texts = []
    for output in (output for cell in cells for output in cell.outputs):
        texts += [output.get("text", ""), *output.get("data", {})]
    return "\n".join(texts)


def make_smaller(stem, cells):
    """Change what `SMALLER` says of a notebook, each thing in exactly one place."""
    for before, after in SMALLER[stem].items():
        (cell,) = (cell for cell in cells if before in cell.source)
        assert cell.source.count(before) == 1
        cell.source = cell.source.replace(before, after)


def test_the_notebooks_are_there():
    assert {notebook.stem for notebook in NOTEBOOKS} == set(LAST)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_complete_and_small(path):
    cells = code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert LAST[path.stem] in put_out(cells)
    assert path.stat().st_size < MOST_BYTES
    assert str(EXAMPLES.parent) not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_the_slow_test_makes_smaller_stands_there(path):
    cells = code(nbformat.read(path, as_version=4))
    make_smaller(path.stem, cells)
    for before, after in SMALLER[path.stem].items():
        assert sum(after in cell.source for cell in cells) == 1
        assert not any(before in cell.source for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    make_smaller(path.stem, code(notebook))
    for cell in code(notebook):
        cell.outputs = []
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    assert LAST[path.stem] in put_out(code(notebook))
