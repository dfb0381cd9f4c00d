"""A page of figures and tables that needs nothing beside it: one HTML file, pictures inside."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

STYLE = """
body { font-family: sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: 85%; }
td, th { padding: 0.15em 0.6em; text-align: right; border-bottom: 1px solid #ddd; } details { margin: 1em 0; }
"""
DPI = 110


def png(figure: Figure) -> bytes:
    """A figure as PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    return buffer.getvalue()


def page(title: str, lines: Sequence[str], pictures: Mapping[str, bytes], tables: Mapping[str, tuple[str, pd.DataFrame]]) -> str:
    """The page.

    Args:
        title: its heading.
        lines: said first, a paragraph each.
        pictures: caption -> PNG.
        tables: name -> what it shows, and its rows.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
    for caption, picture in pictures.items():
        inside = base64.b64encode(picture).decode()
        parts.append(f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" src="data:image/png;base64,{inside}">')
    for name, (about, table) in tables.items():
        rows = table.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")
        parts.append(f"<details><summary><b>{html.escape(name)}</b>: {html.escape(about)}</summary>\n{rows}\n</details>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return "\n".join(['<!doctype html>\n<html lang="en">', f"<head>{head}</head>", "<body>", *parts, "</body></html>", ""])
