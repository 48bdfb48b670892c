"use strict";
// Sorts the jobs by a column: the worst first, with a second click the best. Where no value is better than another, the
// largest is first; jobs without a value stay last.
document.documentElement.classList.add("js");
const table = document.getElementById("numbers"), foot = table.tFoot;
const jobs = [...table.tBodies].map((body) => ({ body, values: JSON.parse(body.dataset.values) }));
const heads = [...table.querySelectorAll("thead .number")];
const changes = Boolean(table.querySelector("tbody .change"));

const sort = (column) => {
  const head = heads[column], better = head.dataset.better;
  const size = (value) => (changes && !better ? Math.abs(value) : value);
  const descending = head.hasAttribute("aria-sort") ? head.ariaSort !== "descending" : better !== "high";
  const rank = (a, b) => {
    const [x, y] = [a.values[column], b.values[column]];
    if (x === null || y === null) return (x === null) - (y === null);
    return descending ? size(y) - size(x) : size(x) - size(y);
  };
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  for (const job of [...jobs].sort(rank)) table.insertBefore(job.body, foot);
};
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));
