"""The parts of a page: one HTML file that needs nothing else, in light and dark, on any width."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --text: #1f2328;
  --quiet: #59636e; --line: #d0d7de; --accent: #0969da; --mark: #ddf4ff; --warn: #bf8700; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --text: #e6edf3;
  --quiet: #9198a1; --line: #30363d; --accent: #6cb6ff; --mark: #12314f; --warn: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; }
p, li { max-width: 76ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
.quiet { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px; margin: 16px 0; }
.verdict { border-left: 4px solid var(--accent); }
.verdict h2 { margin-top: 0; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-size: .85rem; font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
tr:last-child td { border-bottom: 0; }
tr.marked td { background: var(--mark); font-weight: 600; }
.maps { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px),
  1fr)); }
.pictures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  460px), 1fr)); }
figure { margin: 0; }
.maps figure, .pictures figure, .wide {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; }
.wide { max-width: 720px; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--quiet); font-size: .9rem; margin-top: 8px; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 12px 0 0; padding: 12px;
  background: var(--page); border: 1px solid var(--line); border-radius: 6px; }
.note { border-left: 4px solid var(--warn); }
.beside { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px),
  1fr)); }
.beside h3 { font-size: .9rem; margin: 0 0 4px; color: var(--quiet); }
.beside p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; margin-top: 12px; }
dd { margin: 0; max-width: 76ch; }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole page of parts that are HTML already; empty ones are left out."""
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>",
    ]
    return "\n".join([*head, *(part for part in parts if part), "</main></body></html>"]) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    """Return a table of text; a marked row stands out."""
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in heads)
    body = []
    for i, row in enumerate(rows):
        mark = ' class="marked"' if i < len(marked) and marked[i] else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(name: str, light: bytes, dark: bytes, caption: str, kind: str = "") -> str:
    """Return a figure that shows one of two PNG pictures, as the display asks."""
    sources = [f"data:image/png;base64,{base64.b64encode(x).decode()}" for x in (light, dark)]
    label = html.escape(name.replace("_", " "))
    return (
        f'<figure class="{kind}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{label}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def paragraphs(lines: Sequence[str], kind: str = "") -> str:
    """Return one paragraph a line of text."""
    mark = f' class="{kind}"' if kind else ""
    return "".join(f"<p{mark}>{html.escape(line)}</p>" for line in lines)
