"""What the pages say of files and of installing: links lead somewhere, commands are those that work today."""

import csv
import re
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it along
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("checkpoints/*/README.md")])
SCRIPTS = sorted(path for kind in ("py", "ipynb", "sh") for path in (ROOT / "examples").glob(f"*.{kind}"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_within_the_project_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    assert [x for x in links if "://" not in x and not (path.parent / x).exists()] == []


@pytest.mark.parametrize("path", PAGES + SCRIPTS, ids=name)
def test_illava_is_installed_from_a_clone(path):
    """It is not on PyPI; the README says so once, where it says what error messages mean."""
    text = path.read_text().replace("\\", "")  # of JSON
    asked = re.findall(r'pip install (?:-e )?"(\w*|\.)\[([\w,-]+)\]', text)
    by_name = [what for what, _ in asked if what != "."]
    assert by_name == (["illava"] if path.name == "README.md" and path.parent == ROOT else [])
    assert {extra for _, extras in asked for extra in extras.split(",")} <= set(EXTRAS)


def test_the_readme_names_every_extra():
    listed = re.search(r"^Extras: .*?\n\n", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`\[([\w-]+)\]`", listed[0])) == set(EXTRAS)


def tables(text):
    """Every table of a page: its rows as lists of cells, the head first."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[line.strip("| ").split(" | ") for line in block.splitlines()] for block in blocks]
    return [[head, *body] for head, _, *body in rows]


def measured(row):
    """A row of benchmarks/prefill.py's CSV as the README prints it."""
    percent = f"{100 * float(row['reduction']):.3g}"
    times = [f"{float(row[name]):.2f}" for name in ("speedup", "p25", "p75")]
    return [
        percent if percent == "0" else f"{percent} %",
        " to ".join(f"{int(count):,}" for count in row["tokens"].split(" > ")),
        f"{float(row['bound']):.2f}x",
        "{}x ({} to {})".format(*times),
        f"{float(row['share_of_bound']):.2f}",
    ]


def test_the_readmes_first_screen_has_a_picture_and_what_was_measured():
    text = (ROOT / "README.md").read_text()
    top = "".join(text.splitlines(keepends=True)[:40])
    with (ROOT / "benchmarks" / "results" / "prefill_cpu.csv").open(newline="") as file:
        rows = [measured(row) for row in csv.DictReader(file)]
    (first,) = tables(top)
    (long,) = [table for table in tables(text.split("\n## How fast\n")[1]) if table[0][0] == "reduction"]
    assert long[1:] == rows
    assert first == [row[:-1] for row in long if row[0] != "0"]
    assert re.search(r"!\[[^]]+\]\(docs/images/see\.jpg\)\n", top).start() < top.index("| reduction |")


def test_the_layout_has_every_part_of_the_package_once():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = re.search(r"\| file \| holds \|\n(.*?)\n\n", text, re.DOTALL)[1]
    named = re.findall(r"`(\w+(?:\.py|/))`", "\n".join(row.split("|")[1] for row in table.split("\n")))
    named += re.findall(r"`(patching\.py)`", table)  # stands in the other column, beside hooks/
    assert len(named) == len(set(named))
    parts = [p.name + "/" * p.is_dir() for p in (ROOT / "illava").iterdir() if p.name[0] not in "._"]
    assert set(named) == set(parts) - {"py.typed"}
