"""Style and script of the page, kept inside it."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1d2025; --soft: #646a74; --line: #e3e1dc;
  --accent: 240 124 32; --word: #0f766e; --phrase: #6d4bc3; --close: #1d4ed8; --far: #c81e1e; }
.ramp.distance { background: var(--distance-light); }
.ramp.difference { background: var(--difference-light); }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --card: #1b1e24; --ink: #e7e8ea; --soft: #9ba2ad; --line: #2f343d;
    --accent: 214 96 20; --word: #3fb8a8; --phrase: #a48cf0; --close: #78aaff; --far: #ff786e; }
  .ramp.distance { background: var(--distance-dark); }
  .ramp.difference { background: var(--difference-dark); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1300px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 0; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
.steps { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 1rem; margin: 0; padding: 0;
  list-style: none; }
.steps b { display: block; }
.steps li { border-left: 3px solid rgb(var(--accent)); padding-left: .8rem; }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin: 1.5rem 0 .5rem; font-size: .8rem;
  color: var(--soft); }
.scale { display: flex; align-items: center; gap: .5rem; }
.scale b { color: var(--ink); font-weight: 600; }
.ramp { width: 80px; height: 14px; border-radius: 3px; border: 1px solid var(--line); }
.mark { width: 40px; height: 4px; border-radius: 3px; background: var(--word); }
.ramp.importance { background: linear-gradient(to right, transparent, rgb(var(--accent) / .9)); }
.facts, .values, .ends { color: var(--soft); margin: .25rem 0 0; font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.5rem 1.5rem;
  margin-top: 1.5rem; }
section.word { --mark: var(--word); }
section.phrase { --mark: var(--phrase); }
.count { display: inline-block; min-width: 1.6em; margin-right: .3em; border-radius: 1em; text-align: center;
  background: var(--mark); color: var(--card); }
.text { display: flex; flex-wrap: wrap; align-items: flex-start; row-gap: .45rem; margin: 1rem 0;
  font-size: 1.05rem; }
.break { flex-basis: 100%; height: 0; }
.gap { white-space: pre; }
.token { display: flex; flex-direction: column; cursor: default; }
.piece { white-space: pre; line-height: 1.55; min-width: .35em;
  background: rgb(var(--accent) / calc(var(--strength) * .9)); }
.token.special .piece { font: .8em/1.93 ui-monospace, monospace; border: 1px dashed var(--soft); border-radius: 4px; }
.token.more .piece { color: var(--soft); }
.token i { height: 4px; margin-top: 2px; }
.token i.on { background: var(--mark); }
.token i.first { border-start-start-radius: 3px; border-end-start-radius: 3px; margin-inline-start: 1px; }
.token i.spaced { margin-inline-start: .28em; }
.token i.last { border-start-end-radius: 3px; border-end-end-radius: 3px; margin-inline-end: 1px; }
.token.lit .piece { outline: 2px solid var(--ink); outline-offset: -1px; }
.matrices { display: flex; flex-wrap: wrap; gap: 1.25rem; }
figure { margin: 0; }
figcaption { font-weight: 600; margin-inline-start: 104px; }
.matrix { display: grid; grid-template: var(--above) var(--size) / 104px var(--size); font-size: 11px;
  line-height: 12px; color: var(--soft); }
.rows, .columns { position: relative; }
.rows { grid-area: 2 / 1; }
.columns { grid-area: 1 / 2; }
.rows span, .columns span { position: absolute; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.rows span { right: 3px; top: calc(var(--at) - 6px); width: 98px; padding-right: 3px; text-align: right;
  unicode-bidi: isolate; background: linear-gradient(to left, rgb(var(--accent) / .4) var(--share), transparent 0); }
.columns span { bottom: 5px; left: calc(var(--at) - 6px); max-height: 86px; width: 12px; writing-mode: vertical-rl;
  transform: rotate(180deg); }
.cells { grid-area: 2 / 2; position: relative; outline: 1px solid var(--line); cursor: crosshair; }
.cells img { display: block; width: var(--size); height: var(--size); image-rendering: pixelated; }
.cells img.smooth { image-rendering: auto; }
.cursor { position: absolute; outline: 2px solid var(--ink); pointer-events: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; text-align: start; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
td.close { color: var(--close); }
td.apart { color: var(--far); }
tbody tr:hover { background: rgb(var(--accent) / .12); }
.bar { display: inline-block; height: .6em; margin-right: .5em; border-radius: 2px; background: var(--mark);
  width: calc(var(--share) * 90px); min-width: 2px; }
td:last-child { min-width: 170px; }
.nothing { padding: .8rem 1rem; border-radius: 8px; background: rgb(var(--accent) / .12); }
#tip { position: fixed; z-index: 1; max-width: 26rem; padding: .5rem .75rem; border-radius: 8px; pointer-events: none;
  background: var(--ink); color: var(--page); font-size: .85rem; line-height: 1.4; white-space: pre-line; }
[hidden] { display: none; }
"""

SCRIPT = """
"use strict";
const pairs = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

function light(section, spans) {
  for (const token of section.querySelectorAll(".token")) {
    const held = token.dataset.spans ? token.dataset.spans.split(" ").map(Number) : [];
    token.classList.toggle("lit", held.some((u) => spans.includes(u)));
  }
}

function point(section, row, column) {
  for (const cells of section.querySelectorAll(".cells")) {
    const cursor = cells.querySelector(".cursor");
    cursor.hidden = row === null;
    if (row === null) continue;
    const side = cells.clientWidth / Number(cells.dataset.size);
    Object.assign(cursor.style, { left: column * side + "px", top: row * side + "px",
      width: side + "px", height: side + "px" });
  }
  light(section, row === null ? [] : [row, column]);
}

function describe(pair, u, v) {
  const [first, second] = [Math.min(u, v), Math.max(u, v)];
  const names = "“" + pair.spans[u] + "” and “" + pair.spans[v] + "”";
  if (u === v) return "“" + pair.spans[u] + "”, salience " + pair.salience[u] + "\\ndistance to itself: 0";
  const n = pair.spans.length, at = first * (2 * n - first - 1) / 2 + second - first - 1;
  const [teacher, student] = [pair.teacher[at], pair.student[at]];
  const off = student - teacher;
  const verdict = Math.abs(off) < 0.0005 ? "as far apart" : off > 0 ? "too far apart" : "too close";
  return names + "\\nteacher: " + teacher.toFixed(3) + "\\nstudent: " + student.toFixed(3) + " (" + verdict + ", " +
    (off < 0 ? "−" : "+") + Math.abs(off).toFixed(3) + ")";
}

function show(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 16, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 20 + box.height > innerHeight ? event.clientY - box.height - 12
    : event.clientY + 20) + "px";
}

for (const cells of document.querySelectorAll(".cells")) {
  const section = cells.closest("section"), pair = pairs[Number(cells.dataset.pair)];
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect(), n = Number(cells.dataset.size);
    const place = (offset) => Math.max(0, Math.min(n - 1, Math.floor(offset / box.width * n)));
    const row = place(event.clientY - box.top), column = place(event.clientX - box.left);
    point(section, row, column);
    show(event, describe(pair, row, column));
  });
  cells.addEventListener("pointerleave", () => { point(section, null, null); tip.hidden = true; });
}

for (const row of document.querySelectorAll("tbody tr")) {
  const section = row.closest("section");
  row.addEventListener("pointerenter", () => point(section, Number(row.dataset.first), Number(row.dataset.second)));
  row.addEventListener("pointerleave", () => point(section, null, null));
}
"""
