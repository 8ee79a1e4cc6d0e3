"""What each family is capable of: the tables under `tests/support/` as one block of the README.

A table is what the tests found on one version of transformers, and is written by

    pytest tests/contract --support tests/support/5.23.0.csv

    python tests/support_table.py    # puts the tables that lie there into the README
"""

from __future__ import annotations

import csv
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- support table -->", "<!-- end -->"
CAPABILITIES = (
    "pictures",
    "video",
    "text only",
    "padded batch",
    "beams",
    "turns",
    "turns with new pictures",
    "features first",
    "labels",
    "fp16 and bf16",
    "eager and sdpa",
    "same as the reference",
    "reversible",
)


def read() -> dict[str, dict[str, dict[str, str]]]:
    """version of transformers -> family -> capability -> result, the newest version first."""
    tables = {}
    for path in sorted((ROOT / "tests/support").glob("*.csv"), key=lambda p: Version(p.stem), reverse=True):
        with path.open(newline="") as file:
            tables[path.stem] = {row.pop("family"): row for row in csv.DictReader(file)}
    return tables


def render() -> str:
    """The block between the markers, both included."""
    tables = read()
    families = list(dict.fromkeys(family for table in tables.values() for family in table))
    notes: list[str] = []
    lines = [
        f"| | transformers | {' | '.join(CAPABILITIES)} |",
        "|---" * (len(CAPABILITIES) + 2) + "|",
    ]
    for family in families:
        rows = {version: table[family] for version, table in tables.items() if family in table}
        rows = {v: row for v, row in rows.items() if not next(iter(row.values())).startswith("not in")}
        cells = [cell({v: row[capability] for v, row in rows.items()}, notes) for capability in CAPABILITIES]
        lines.append(f"| `{family}` | {', '.join(rows)} | {' | '.join(cells)} |")
    numbered = "".join(f"\n{number}. {note}" for number, note in enumerate(notes, start=1))
    return "\n".join([BEGIN, *lines]) + (f"\n{numbered}" if notes else "") + f"\n{END}"


def cell(results: dict[str, str], notes: list[str]) -> str:
    """Yes, no, or the versions of transformers that can; and the numbers of the notes that say more."""
    able = [version for version, result in results.items() if result.startswith("passed")]
    word = "yes" if len(able) == len(results) else ", ".join(able) or "no"
    reasons: dict[str, list[str]] = {}
    for version, result in results.items():
        state, _, reason = result.partition("unpatched cannot: ")
        if reason:
            reasons.setdefault(f"The unpatched model cannot {reason}", []).append(version)
        elif state != "passed":
            reasons.setdefault(state[0].upper() + state[1:], []).append(version)
    numbers = []
    for reason, versions in reasons.items():
        note = f"{reason}." if len(versions) == len(results) else f"{', '.join(versions)}: {reason}."
        if note not in notes:
            notes.append(note)
        numbers.append(str(notes.index(note) + 1))
    return f"{word} ({', '.join(numbers)})" if numbers else word


def place(readme: str) -> str:
    """The README with the block in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + render() + after


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(place(path.read_text()))
