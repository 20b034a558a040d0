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
  if (u === v) return "“" + pair.spans[u] + "”, salience " + pair.salience[u] + "\ndistance to itself: 0";
  const n = pair.spans.length, at = first * (2 * n - first - 1) / 2 + second - first - 1;
  const [teacher, student] = [pair.teacher[at], pair.student[at]];
  const off = student - teacher;
  const verdict = Math.abs(off) < 0.0005 ? "as far apart" : off > 0 ? "too far apart" : "too close";
  return names + "\nteacher: " + teacher.toFixed(3) + "\nstudent: " + student.toFixed(3) + " (" + verdict + ", " +
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
