"""The workbook as a static site with search: `make site`. Pages are the executed notebooks of `make demo`, the README and what lies in docs.

    python scripts/site.py [--notebooks runs/demo] [--out build/site]

A page may be read anywhere: formulas are MathML, pictures lie beside the page, nothing is loaded from elsewhere. Links that lead nowhere end the build.
"""

import argparse
import base64
import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # beside the README, where they are there
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r"(?<!\\)(\$\$?)([^$]+)\1")
CONFIG = {
    "site_name": "homelib",
    "use_directory_urls": False,  # so that it can be read from a disk
    "theme": {"name": "material", "font": False, "palette": {"primary": "white"}, "features": ["navigation.footer", "toc.follow"]},
    "markdown_extensions": ["tables", "fenced_code", "attr_list", "md_in_html", {"toc": {"permalink": False}}],
    "plugins": ["search"],
    "extra_css": ["site.css"],
    "extra_javascript": ["site.js"],
    "extra": {"generator": False},
    "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}, "nav": {"omitted_files": "ignore"}},
}
CSS = """
.md-typeset .output table { font-size: .64rem; border-collapse: collapse; display: block; overflow-x: auto; }
.md-typeset .output th, .md-typeset .output td { padding: .2em .6em; text-align: right; }
.md-typeset a { text-decoration: underline; }
.md-typeset pre.output { font-size: .64rem; padding: .8em; background: #f5f5f5; color: #1a1a1a; overflow-x: auto; }
"""
SCRIPT = """
// What the theme leaves out: a name of its search dialog, and keys for tables wider than the page, whose frames it makes when a page is shown.
document.querySelectorAll(".md-search").forEach(search => search.setAttribute("aria-label", "Search"));
const reach = () => document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach(frame => frame.setAttribute("tabindex", "0"));
new MutationObserver(reach).observe(document.body, { childList: true, subtree: true });
reach();
"""


def page(notebook: Path, folder: Path) -> str:
    """An executed notebook as Markdown; its pictures are written into `folder`. Raises ValueError: it has not been executed."""
    cells = nbformat.read(notebook, as_version=4).cells
    if not any(cell.get("outputs") for cell in cells):
        raise ValueError(f"{notebook}: no outputs there, expected an executed notebook. `make demo` makes them.")
    parts, section, pictures = [], notebook.stem, 0
    for cell in cells:
        if cell.cell_type == "markdown":
            section = next((line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")), section)
            parts.append(_with_formulas(cell.source))
        elif cell.cell_type == "code" and cell.source.strip():
            parts.append(f"```python\n{cell.source}\n```")
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/png" in data:
                    pictures += 1
                    name = f"{notebook.stem}-{pictures:02d}.png"
                    (folder / name).write_bytes(base64.b64decode(data["image/png"]))
                    parts.append(f"![{section}, figure {pictures} of this page]({name})")
                else:
                    parts.append(_output(output, data))
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict, data: dict) -> str:
    """Tables as they are, in one block; else the text."""
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "<table" in (table := "".join(data.get("text/html", ""))):
        whole = re.sub(r"\n\s*", "\n", table).replace("<th></th>", "<td></td>")  # a heading without a word is none
        whole = re.sub(r'<th class="(blank[^"]*|index_name[^"]*)"[^>]*>\s*(&nbsp;)?\s*</th>', "<td></td>", whole)
        return f'<div class="output" tabindex="0">\n{whole}\n</div>'
    text = "".join(output.get("text", "") or data.get("text/plain", ""))
    text = re.sub(r"\x1b\[[0-9;]*m|.*\r(?!\n)", "", text).rstrip()  # no colours of a terminal; of a progress bar its last state
    return f'<pre class="output" tabindex="0">{html.escape(text)}</pre>'.replace("\n", "&#10;") if text else ""


def _with_formulas(source: str) -> str:
    from latex2mathml.converter import convert

    parts = re.split(r"(```.*?```|`[^`\n]*`)", source, flags=re.S)  # code keeps its dollars
    return "".join(
        part if index % 2 else FORMULA.sub(lambda m: convert(m[2].strip(), display="block" if m[1] == "$$" else "inline"), part)
        for index, part in enumerate(parts)
    )


def with_links(text: str, source: str, pages: dict[str, str]) -> str:
    """A page's text whose links lead to other pages; what is in the clone but no page is named without one, and a link to nothing is left, to be found.

    Args:
        source: the page's file in the clone. pages: of every file that is one, its place in the site.
    """
    here = ROOT / source

    def told(link: re.Match) -> str:
        target = Path(os.path.normpath(here.parent / link[2]))
        name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if name in pages:
            return f"[{link[1]}]({os.path.relpath(pages[name], Path(pages[source]).parent)}{link[3] or ''})"
        return link[1] if name and target.exists() else link[0]

    return LINK.sub(told, text)


def build(notebooks: Path, out: Path) -> None:
    """Raises ValueError: no executed notebooks there. Ends with mkdocs' status where a link leads nowhere."""
    executed = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not executed:
        raise ValueError(f"{notebooks}: no executed notebooks there. `make demo` makes them; --notebooks names another folder.")
    work = out.parent / "site-pages"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(ROOT / "docs", work / "docs")
    (work / "notebooks").mkdir()
    pages = {"README.md": "index.md"} | {name: name for name in PAGES if (ROOT / name).exists()}
    pages |= {name: name for path in (ROOT / "docs").glob("*.md") if (name := path.relative_to(ROOT).as_posix())}
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in pages}
    navigation = []
    for notebook in executed:
        name, place = f"notebooks/{notebook.stem}.ipynb", f"notebooks/{notebook.stem}.md"
        pages[name], texts[name] = place, page(notebook, work / "notebooks")
        navigation.append({notebook.stem[:2] + " " + notebook.stem[3:].replace("_", " ").capitalize(): place})
    for name, text in texts.items():
        (work / pages[name]).write_text(with_links(text, name, pages), encoding="utf-8")
    (work / "site.css").write_text(CSS)
    (work / "site.js").write_text(SCRIPT)
    more = [{path.stem.replace("_", " ").capitalize(): path.relative_to(work).as_posix()} for path in sorted((work / "docs").glob("*.md"))]
    more += [{name.removesuffix(".md").capitalize(): name} for name in PAGES if (work / name).exists()]
    told = CONFIG | {"docs_dir": str(work), "site_dir": str(out), "nav": [{"Start": "index.md"}, {"Notebooks": navigation}, {"More": more}]}
    (work.parent / "mkdocs.yml").write_text(yaml.safe_dump(told, sort_keys=False))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(work.parent / "mkdocs.yml")]
    if status := subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False).returncode:
        sys.exit(status)
    print(f"{len(executed)} notebooks and {1 + len(more)} other pages: open {out / 'index.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=Path, default=Path(os.environ.get("HOMELIB_RUNS", ROOT / "runs")) / "demo")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    given = parser.parse_args()
    try:
        build(given.notebooks.resolve(), given.out.resolve())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
