"use strict";

const tips = JSON.parse(document.getElementById("tips").textContent);
const tip = document.getElementById("tip");

function say(name, x, y) {
  tip.textContent = tips[name] ?? "";
  tip.hidden = tip.textContent === "";
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  const top = y + 16 + height > innerHeight ? y - 16 - height : y + 16;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
}

function light(member) {
  for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
  if (member === undefined) return;
  for (const element of document.querySelectorAll(`[data-member="${member}"]`)) element.classList.add("lit");
}

function point(target, x, y) {
  const mark = target.closest("[data-tip]");
  if (mark) say(mark.dataset.tip, x, y);
  else tip.hidden = true;
  light(target.closest("[data-member]")?.dataset.member);
}

document.addEventListener("pointermove", (event) => {
  if (event.target instanceof Element) point(event.target, event.clientX, event.clientY);
});
document.addEventListener("focusin", (event) => {
  const box = event.target.getBoundingClientRect();
  point(event.target, box.right, box.bottom);
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

/* Headers sort; a second click turns the order around. Accuracies start with the best. */
const heads = [...document.querySelectorAll(".members th")];
heads.forEach((head, column) => {
  head.querySelector("button")?.addEventListener("click", () => {
    const first = head.textContent.includes("accuracy") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const each of heads) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const body = head.closest("table").tBodies[0];
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const difference = Number(value(a)) - Number(value(b));
      return sign * (Number.isNaN(difference) ? value(a).localeCompare(value(b), undefined, { numeric: true }) : difference);
    });
    body.append(...rows);
  });
});

function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", unfold);
unfold();

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
