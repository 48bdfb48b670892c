// Two videos side by side, or one over the other, at the same moment.
let pair = [], following = 0;
const mark_pair = () => {
  for (const button of document.querySelectorAll("[data-act=compare]")) {
    button.setAttribute("aria-pressed", String(pair.includes(card_at(button))));
  }
};
const choose = (card) => {
  if (!card || !card.src) return;
  pair = pair.includes(card) ? pair.filter((other) => other !== card) : [...pair, card].slice(-2);
  mark_pair();
  if (pair.length === 2) compare(); else if (pair.length) say(`${card.id}: choose another to compare it with`);
};
const leave_pair = () => { pair = []; mark_pair(); };

const rows_of = (card) => new Map([
  ["id", card.id],
  ...[...card.el.querySelectorAll(".more tr:not(.fact)")].map((row) => [row.cells[0].textContent, row.cells[1].textContent]),
  ["given", (card.el.querySelector(".given") || {}).textContent || ""],
]);
const show_differences = () => {
  const [left, right] = pair.map(rows_of);
  const keys = [...new Set([...left.keys(), ...right.keys()])].filter((key) => left.get(key) !== right.get(key));
  $("differences").replaceChildren(...keys.map((key) => {
    const row = document.createElement("tr"), texts = [["th", key], ["td", left.get(key) || ""], ["td", right.get(key) || ""]];
    row.append(...texts.map(([kind, textContent]) => Object.assign(document.createElement(kind), { textContent })));
    return row;
  }));
};
// The first video leads; the second one is put to its moment where they drift apart.
const follow = () => {
  if (!$("compare").open) return;
  const [a, b] = $("pair").children, moment = Math.min(a.currentTime, Math.max(0, (b.duration || 0) - 0.01));
  if (b.readyState && !b.seeking && Math.abs(b.currentTime - moment) > (a.paused ? 0.005 : 0.06)) b.currentTime = moment;
  if (a.paused !== b.paused) { if (a.paused) b.pause(); else if (moment === a.currentTime) play(b); }
  if (a.duration && document.activeElement !== $("moment")) $("moment").value = 1000 * a.currentTime / a.duration;
  $("pair-play").textContent = a.paused ? "play" : "pause";
  following = requestAnimationFrame(follow);
};
const compare = () => {
  const [a, b] = pair.map(new_video);
  b.loop = false;
  $("pair").replaceChildren(a, b);
  $("pair").classList.toggle("small", pair.every((card) => card.media.classList.contains("small")));
  $("names").textContent = `${pair[0].id}  |  ${pair[1].id}`;
  show_differences();
  set_wipe();
  $("compare").showModal();
  settle();
  if (motion) play(a);
  cancelAnimationFrame(following);
  follow();
};
const set_wipe = () => {
  const on = $("mode").getAttribute("aria-pressed") === "true", [, over] = $("pair").children;
  $("pair").classList.toggle("wiped", on);
  $("wipe").hidden = !on;
  if (over) over.style.clipPath = on ? `inset(0 0 0 ${$("wipe").value}%)` : "none";
};
const pair_toggle = () => {
  const [a] = $("pair").children;
  if (a.paused) play(a); else a.pause();
  $("moment").blur();
};
$("mode").addEventListener("click", () => {
  $("mode").setAttribute("aria-pressed", String($("mode").getAttribute("aria-pressed") !== "true"));
  set_wipe();
});
$("wipe").addEventListener("input", set_wipe);
$("pair").addEventListener("pointermove", (event) => {
  if ($("wipe").hidden) return;
  const box = $("pair").lastElementChild.getBoundingClientRect();
  $("wipe").value = 100 * (event.clientX - box.left) / box.width;
  set_wipe();
});
$("moment").addEventListener("input", () => {
  const [a] = $("pair").children;
  a.pause();
  if (a.duration) a.currentTime = Math.min(a.duration - 0.001, $("moment").value / 1000 * a.duration);
});
$("pair-play").addEventListener("click", pair_toggle);
$("compare").addEventListener("close", () => {
  for (const video of [...$("pair").children]) empty(video);
  leave_pair();
  plan();
});
