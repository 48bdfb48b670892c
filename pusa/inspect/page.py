"""Write HTML pages in one file, without scripts or external resources, in which every text is escaped."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from typing import Any, NewType

from PIL import Image

from pusa.system.text import printable

Html = NewType("Html", str)  # escaped; only functions of this module make it
JPEG_QUALITY = 82
LONGEST = 2000  # characters of a caption, or of a cell

_STYLE = """
:root { color-scheme: light dark; --line: #0002; --card: #fff; --ground: #f5f5f3; --quiet: #666; --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --line: #fff3; --card: #232325; --ground: #18181a; --quiet: #a5a5a5; --bad: #ff8a80 }
  body { color: #ececec }
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; max-width: 1500px;
  background: var(--ground) }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .75rem }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)) }
main.wide { grid-template-columns: 1fr }
article { padding: .75rem; background: var(--card); border-radius: .5rem; box-shadow: 0 1px 3px var(--line) }
h3 { margin: .5rem 0 .25rem; font-size: 1rem; overflow-wrap: anywhere }
p { margin: .25rem 0; max-height: 9em; overflow: auto; overflow-wrap: anywhere }
.strip { display: flex; gap: 3px; max-height: none } .strip img { min-width: 0; max-width: 100%; height: auto }
small, dt, th { color: var(--quiet) } .bad { color: var(--bad) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 } dd { margin: 0 }
dd, td { overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; background: var(--card) }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, parts: Iterable[Html]) -> str:
    """Return the whole page."""
    return _PAGE.format(title=text(title), style=_STYLE, body="\n".join(parts))


def text(value: Any, longest: int = 300) -> Html:
    """Return escaped text, cut at `longest` characters."""
    return Html(escape(printable(value, longest)))


def section(title: str, *parts: Html) -> Html:
    """Return parts below a heading."""
    return Html(f"<section><h2>{text(title)}</h2>\n{''.join(parts)}</section>")


def cards(articles: Iterable[Html], wide: bool = False) -> Html:
    """Return articles in a grid, or with `wide` one on each line."""
    inner = "\n".join(f"<article>{article}</article>" for article in articles)
    return Html(f'<main class="wide">{inner}</main>' if wide else f"<main>{inner}</main>")


def heading(value: Any) -> Html:
    """Return the heading of an article."""
    return Html(f"<h3>{text(value)}</h3>")


def paragraph(value: Any, quiet: bool = False, bad: bool = False, longest: int = 300) -> Html:
    """Return a paragraph of text: in small grey letters (`quiet`), or in red (`bad`)."""
    inner = f"<small>{text(value, longest)}</small>" if quiet else text(value, longest)
    return Html(f'<p class="bad">{inner}</p>' if bad else f"<p>{inner}</p>")


def strip(images: Sequence[Image.Image]) -> Html:
    """Return pictures side by side."""
    return Html('<p class="strip">' + "".join(map(_picture, images)) + "</p>")


def pairs(items: Iterable[tuple[str, str]]) -> Html:
    """Return a list of labels and their texts."""
    inner = "".join(f"<dt>{text(name)}</dt><dd>{text(value, LONGEST)}</dd>" for name, value in items)
    return Html(f"<dl>{inner}</dl>")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """Return a table with a row of column names."""
    lines = []
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        inner = "".join(f"<{tag}>{text(cell, LONGEST)}</{tag}>" for cell in cells)
        lines.append(f"<tr>{inner}</tr>")
    return Html("<table>" + "\n".join(lines) + "</table>")


def _picture(image: Image.Image) -> str:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="">'
