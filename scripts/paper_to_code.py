"""Writes docs/paper_to_code.md, the table from the paper to the code to the test, from docs/paper_to_code.yaml.

    python scripts/paper_to_code.py

Reads and writes text alone; tests/test_paper_to_code.py tries every name, and compares the page with what is written here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE, PAGE = DOCS / "paper_to_code.yaml", DOCS / "paper_to_code.md"
FIELDS = {"of", "says", "code", "tests", "here", "as_paper", "departs", "values", "manifest", "grid", "missing"}
PARTS = {"equations": "Equations", "figures": "Figures", "tables": "Tables", "settings": "Settings"}
HEAD = """# From the paper to the code to the test

*Mamba Goes HoME* (NeurIPS 2025, arXiv 2507.06363): where each of its equations, figures, tables and settings is, which test holds it, and
which switch departs from it. The default is the network as its authors released it. Where that is not what the paper writes, the column
*here* says what it is, and *switches* what gives the paper's form. Eq. 18, 20 and 21 are known by their place beside Eq. 19, 22 and 23.

This page is written by `python scripts/paper_to_code.py` from `docs/paper_to_code.yaml`; a test tries every name in it. The switches are
told in [switches.md](switches.md), the paper's settings as commands in [training.md](training.md), grids in [ablations.md](ablations.md);
how to add one in [CONTRIBUTING.md](../CONTRIBUTING.md). `home tables --paper T5` prints a table of the paper, with notes.
"""


def rows() -> dict[str, list[dict[str, Any]]]:
    """Part of the paper -> its rows, as the YAML has them."""
    return yaml.safe_load(SOURCE.read_text(encoding="utf-8"))


def page(parts: Mapping[str, list[dict[str, Any]]]) -> str:
    """The page as Markdown."""
    lines = [HEAD]
    for part, title in PARTS.items():
        lines += [f"## {title}\n", "| paper | what it says | code | test | here | switches |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [_line(row) for row in parts[part]] + [""]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["of"], row["says"], _code(row["code"]), _tests(row["tests"]), _here(row), _switches(row)]
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"


def _code(places: list[str]) -> str:
    """Links to the modules: `home.HoME`."""
    links = []
    for place in places:
        module, symbol = place.split(":")
        path = module.replace(".", "/")
        file = f"{path}/__init__.py" if (DOCS.parent / "homelib" / path).is_dir() else f"{path}.py"
        links.append(f"[`{module.rsplit('.', 1)[-1]}.{symbol}`](../homelib/{file})")
    return ", ".join(links)


def _tests(places: list[str]) -> str:
    links = []
    for place in places:
        file, test = place.split("::")
        links.append(f"[{test.removeprefix('test_').replace('_', ' ')}](../tests/{file})")
    return "; ".join(links)


def _here(row: Mapping[str, Any]) -> str:
    told = [row["here"]] if "here" in row else []
    told += [f"paper's values: {_pairs(row['values'])}"] if "values" in row else []
    told += [f"`{name}`: {_pairs(fields)}" for name, fields in row.get("manifest", {}).items()]
    told += [f"grid `{row['grid']}`"] if "grid" in row else []
    told += [f"**Not here:** {row['missing']}"] if "missing" in row else []
    return "; ".join(told) or "as the paper says"


def _switches(row: Mapping[str, Any]) -> str:
    told = [f"as the paper: {_pairs(row['as_paper'])}"] if "as_paper" in row else []
    told += [f"`{name}`: {', '.join(_plain(value) for value in values)}" for name, values in row.get("departs", {}).items()]
    return "; ".join(told)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={_plain(value)}`" for name, value in values.items())


def _plain(value: Any) -> str:
    """As one would write it after `--set name=`."""
    if isinstance(value, list):
        return "[" + ",".join(_plain(one) for one in value) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(rows()), encoding="utf-8")
    print(f"{PAGE}: {sum(map(len, rows().values()))} rows")
