"""The HTML of a report: a template that escapes every value, its style, and the one script, which shows values and sorts tables."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from meshformer.printing import visible

CSS = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --dim: #555; --line: #ddd; --code: #f6f6f6; }
@media (prefers-color-scheme: dark) {
  :root { --page: #141414; --text: #e4e4e4; --dim: #a6a6a6; --line: #3a3a3a; --code: #202020; }
  img, .swatch { filter: invert(1) hue-rotate(180deg) brightness(1.25); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; } figure { margin: 1.2rem 0; }
.panels { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: flex-start; } .panels img { max-width: 100%; height: auto; }
figcaption, .note { color: var(--dim); font-size: .87rem; overflow-wrap: anywhere; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; } td.n { text-align: right; }
th.sorts { cursor: pointer; } th.sorts:hover, th.sorts:focus { text-decoration: underline; }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
pre { background: var(--code); padding: .7rem; overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
#tip { position: fixed; pointer-events: none; background: var(--page); color: var(--text); border: 1px solid var(--line); padding: .3rem .5rem;
  font-size: .8rem; max-width: 22rem; font-variant-numeric: tabular-nums; }
#tip p { margin: 0; } .swatch { display: inline-block; width: .7em; height: .7em; margin-right: .4em; }
"""
SCRIPT = """
const tip = document.getElementById("tip"), MOST = 12;
const along = (value, [low, high], log) => {
  const of = x => log ? Math.log10(x) : x;
  return (of(value) - of(low)) / (of(high) - of(low));
};
const number = x => Math.abs(x) >= 1000 ? x.toLocaleString("en") : String(x);
function row(text, colour) {
  const line = document.createElement("p");
  if (colour) {
    const swatch = line.appendChild(document.createElement("span"));
    swatch.className = "swatch";
    swatch.style.background = colour;
  }
  line.append(text);
  return line;
}
for (const image of document.querySelectorAll("img[data-plot]")) {
  const plot = JSON.parse(image.dataset.plot), [left, top, right, bottom] = plot.box;
  const show = event => {
    const frame = image.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width - left) / (right - left);
    const y = (bottom - (event.clientY - frame.top) / frame.height) / (bottom - top);
    tip.hidden = x < -0.03 || x > 1.03 || y < -0.05 || y > 1.05;
    if (tip.hidden) return;
    const near = plot.lines.map(line => {
      const far = line.x.map(value => Math.abs(along(value, plot.x, plot.log[0]) - x));
      const i = far.indexOf(Math.min(...far));
      return { name: line.name, colour: line.colour, x: line.x[i], y: line.y[i], off: far[i],
               up: Math.abs(along(line.y[i], plot.y, plot.log[1]) - y) };
    });
    const best = near.reduce((a, b) => b.off < a.off ? b : a);
    const rows = near.filter(point => point.off < best.off + 0.03).sort((a, b) => a.up - b.up).slice(0, MOST);
    tip.replaceChildren(row(`${plot.names[0]} ${number(best.x)}`));
    for (const point of rows) tip.append(row(`${point.name} ${number(point.y)}`.trim(), point.colour));
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8))}px`;
  };
  image.addEventListener("pointermove", show);
  image.addEventListener("pointerdown", show);
  image.addEventListener("pointerleave", () => { tip.hidden = true; });
}
for (const table of document.querySelectorAll("table.sorted")) {
  const [first, ...rows] = table.rows;
  const key = (line, i) => line.cells[i].dataset.value === undefined ? line.cells[i].textContent : Number(line.cells[i].dataset.value);
  [...first.cells].forEach((head, i) => {
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of first.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      rows.sort((a, b) => {
        const [x, y] = [key(a, i), key(b, i)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return down * (typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1);
      });
      first.parentNode.append(...rows);
    };
    head.className = "sorts";
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""
# The browser runs this script alone: the policy names its hash.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible(value)  # the output of a macro is escaped already


# A run's files are untrusted. All text from them enters through this template, which escapes every value, and the Content-Security-Policy keeps the
# browser from loading anything and from running anything but SCRIPT.
PAGE = Environment(autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
{% macro draw(table, sorted=false) %}
<div class="wide"><table{% if sorted %} class="sorted"{% endif %}><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td{% if cell.number is not none %} class="n" data-value="{{ cell.number }}"{% endif %}>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title><style>{{ css }}</style></head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ source }}<br>{{ states }}; commit {{ commits }}; written {{ now }}</p>
{% if problems %}
<h2>Left out</h2><ul>{% for text in problems %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% if results and not single %}
<h2>Results</h2>
<p class="note">Finished runs, best first; ± is the deviation over seeds. A click on a heading sorts.</p>
{{ draw(results, true) }}
{% endif %}
{% if figures %}
<h2>Figures</h2>
{% endif %}
{% for figure in figures %}
<figure><div class="panels">
{% for panel in figure.panels %}
<img alt="{{ figure.caption }}" src="{{ panel.data }}"{% if panel.plot %} data-plot="{{ panel.plot }}"{% endif %}>
{% endfor %}
</div><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% if profile %}
<h2>Recorded steps</h2>
<p class="note">Milliseconds of a step, the mean of steps {{ profile.steps }}.</p>
{{ draw(profile.table) }}
<ul>{% for text in profile.told %}<li>{{ text }}</li>{% endfor %}</ul>
{% for figure in profile.figures %}
<figure><div class="panels"><img alt="{{ figure.caption }}" src="{{ figure.data }}"></div><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% endif %}
{% if results and single %}
<h2>Results</h2>
{{ draw(results) }}
{% endif %}
{% if runs %}
<h2>Runs</h2>
{% if more %}
<p class="note">{{ more }}</p>
{% endif %}
{{ draw(runs, true) }}
{% endif %}
<h2>Settings</h2>
{% if not single %}
<p class="note">Of the latest, {{ latest }}; the others differ by what the table shows.</p>
{% endif %}
{% for part in settings %}
<details{% if part.open %} open{% endif %}><summary>{{ part.name }}</summary><pre>{{ part.text }}</pre></details>
{% endfor %}
<div id="tip" hidden></div>
<script>{{ script }}</script>
</body></html>
"""
)
