"""A result table in the forms that people need: Markdown, LaTeX (booktabs), CSV, and styled in a notebook; the best is bold, what is alike italic.

A table is text cells with a mark each, so that every form shows the same digits and the same marks.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from .scores import ALIKE, BEST

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

STYLES = {BEST: "font-weight: bold", ALIKE: "font-style: italic"}
MARKDOWN = {BEST: "**{}**", ALIKE: "*{}*"}
LATEX = {BEST: r"\textbf{{{}}}", ALIKE: r"\textit{{{}}}"}
ESCAPED = {"\\": r"\textbackslash{}", **{c: "\\" + c for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
WITHOUT_NUMBER = ("", "-", "nan")  # cells, in a column of numbers
MARKS_TOLD = "Bold: the best. Italic: not significantly worse than the best (p of at least 0.05 after Holm's correction)."


@dataclass(frozen=True)
class Printed:
    """cells: text, rows and columns named. marks: of the same shape, "best", "alike" or "". caption: a sentence. notes: lines below the table."""

    cells: pd.DataFrame
    marks: pd.DataFrame
    caption: str
    notes: tuple[str, ...] = ()

    @classmethod
    def plain(cls, cells: pd.DataFrame, caption: str, notes: tuple[str, ...] = ()) -> "Printed":
        """A table without marks."""
        return cls(cells, pd.DataFrame("", index=cells.index, columns=cells.columns), caption, notes)

    @property
    def told(self) -> tuple[str, ...]:
        """The notes, and what the marks mean where there are any."""
        return (*((MARKS_TOLD,) if (self.marks != "").to_numpy().any() else ()), *self.notes)

    def as_text(self, form: str) -> str:
        """As "markdown", "latex" or "csv"."""
        return {"markdown": self.markdown, "latex": self.latex, "csv": self.csv}[form]()

    def markdown(self) -> str:
        head = [_piped(name) for name in (self.cells.index.name or "", *self.cells.columns)]
        lines = [head, under_heads(self._columns)]
        lines += [[_piped(name), *row] for name, row in zip(self.cells.index, self._marked(MARKDOWN, _piped), strict=True)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([f"**{self.caption}**", table, *self.told])

    def latex(self) -> str:
        r"""A floating table; the document needs `\usepackage{booktabs}`."""
        head = " & ".join(map(_escaped, [self.cells.index.name or "", *self.cells.columns])) + r" \\"
        body = [" & ".join([_escaped(name), *row]) + r" \\" for name, row in zip(self.cells.index.astype(str), self._marked(LATEX, _escaped), strict=True)]
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(' '.join([self.caption + '.', *self.told]))}}}"]
        sides = "".join("r" if of_numbers(texts) else "l" for texts in self._columns)
        lines += [rf"\begin{{tabular}}{{l{sides}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}", r"\end{table}"])

    def csv(self) -> str:
        return self.cells.to_csv()

    def styled(self) -> "Styler":
        """For a notebook; what there is to say is below, a line each."""
        styles = self.marks.map(lambda mark: STYLES.get(mark, ""))
        said = "<br>".join(html.escape(line) for line in (self.caption + ".", *self.told))
        below: Any = {"selector": "caption", "props": "caption-side: bottom; text-align: left"}
        return self.cells.style.apply(lambda _: styles, axis=None).set_caption(said).set_table_styles([below])

    @property
    def _columns(self) -> list[list[str]]:
        return self.cells.astype(str).to_numpy().T.tolist()

    def _marked(self, forms: dict[str, str], escape: Callable[[str], str]) -> list[list[str]]:
        rows = zip(self.cells.to_numpy().tolist(), self.marks.to_numpy().tolist(), strict=True)
        return [[forms.get(mark, "{}").format(escape(str(text))) for text, mark in zip(*row, strict=True)] for row in rows]


def of_numbers(texts: Sequence[str]) -> bool:
    """Whether a column is set to the right: each cell begins with a number, or has none in its place.

    >>> of_numbers(["50.0 (40.2 to 59.8)", "-"]), of_numbers(["MODEL", ""])
    (True, False)
    """
    return all(text in WITHOUT_NUMBER or re.match(r"[-+]?\.?\d", text) for text in texts)


def under_heads(columns: Sequence[Sequence[str]]) -> list[str]:
    """Markdown's second line of a table, by the cells of each column after the first, which names the rows: numbers stand to the right.

    >>> under_heads([["MODEL", ""], ["80.0", "7.5"]])
    ['---', '---', '---:']
    """
    return ["---", *("---:" if of_numbers(texts) else "---" for texts in columns)]


def _escaped(text: str) -> str:
    return "".join(ESCAPED.get(character, character) for character in str(text))


def _piped(text: object) -> str:
    return str(text).replace("|", r"\|")
