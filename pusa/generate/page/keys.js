// Pointer, keyboard and theme.
const leave = () => { if (current) current.el.classList.remove("current"); current = null; };
const mark_current = (card) => { leave(); current = card; card.el.classList.add("current"); };
const go = (card) => {
  if (!card) return;
  mark_current(card);
  card.el.focus({ preventScroll: true });
  const { top, bottom } = card.el.getBoundingClientRect(), bar = $("bar").offsetHeight;
  if (top < bar || bottom > innerHeight - 60) {
    card.el.scrollIntoView({ block: bottom - top > innerHeight - bar ? "start" : "center", inline: "nearest" });
  }
  plan();
};
const step = (by) => {
  const list = in_order(), place = list.indexOf(current);
  go(list[place < 0 ? 0 : Math.min(list.length - 1, Math.max(0, place + by))]);
};
const move = (down) => {
  if (!current) return step(1);
  const here = current.el.getBoundingClientRect(), middle = here.left + here.width / 2;
  let best = null, least = Infinity;
  for (const card of in_order()) {
    const box = card.el.getBoundingClientRect(), away = down ? box.top - here.top : here.top - box.top;
    const far = away + 2 * Math.abs(box.left + box.width / 2 - middle);
    if (away > 20 && far < least) { best = card; least = far; }
  }
  go(best);
};

const follow_link = (event, link) => {
  const target = document.getElementById(decodeURIComponent(link.hash.slice(1)));
  if (!target) return;
  if (target.hidden) clear();
  event.preventDefault();
  go(card_of.get(target));
};
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#job-']"), card = card_at(event.target);
  if (link) follow_link(event, link);
  if (!card) return;
  if (current !== card) leave();
  const prompt = event.target.closest(".prompt");
  if (event.target.closest("[data-act=compare]")) choose(card);
  else if (event.target.closest(".plays") && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault(); // without the script, or in another tab, the link shows the file
    open_large(plays(), card);
  }
  else if (prompt && !String(getSelection())) prompt.classList.toggle("whole");
});
document.addEventListener("focusin", (event) => {
  const card = card_at(event.target);
  if (card && card !== current && event.target.matches(":focus-visible")) mark_current(card);
});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
$("help-button").addEventListener("click", () => $("help").showModal());

const SYSTEM_DARK = matchMedia("(prefers-color-scheme: dark)");
const set_theme = (theme) => {
  if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
  $("theme").setAttribute("aria-label", `theme: ${theme || "as the system"}`);
};
const turn_theme = () => {
  const other = SYSTEM_DARK.matches ? "light" : "dark", theme = root.dataset.theme === other ? "" : other;
  set_theme(theme);
  try { localStorage.setItem("pusa theme", theme); } catch { /* a private window */ }
};
try {
  const theme = localStorage.getItem("pusa theme");
  set_theme(theme === "light" || theme === "dark" ? theme : "");
} catch { set_theme(""); }
$("theme").addEventListener("click", turn_theme);

const escape = () => {
  if (pair.length) leave_pair();
  else if (asked.state || asked.task || asked.words.length) clear();
  else if (current) { current.el.blur(); leave(); plan(); }
};
const open_current = () => { if (current && current.src) open_large(plays(), current); };
const KEYS = {
  j: () => step(1), k: () => step(-1), ArrowRight: () => step(1), ArrowLeft: () => step(-1),
  ArrowDown: () => move(true), ArrowUp: () => move(false),
  " ": () => { if (current) toggle(current); else step(1); }, x: () => keep(current),
  c: () => choose(current), f: open_current, Enter: open_current,
  s: () => { const more = current && current.el.querySelector(".more"); if (more) more.open = !more.open; },
  "/": () => $("search").focus(), p: turn_motion, d: turn_theme, "?": () => $("help").showModal(), Escape: escape,
};
const COMPARE_KEYS = { " ": pair_toggle, w: () => $("mode").click() };
const keys_now = () => ($("compare").open ? COMPARE_KEYS : $("large").open ? LARGE_KEYS : $("help").open ? {} : KEYS);
const in_field = (event) => {
  if (event.key === "Escape") { event.target.blur(); if (event.target === $("search")) clear(); }
  if (event.key === "Enter" && event.target === $("search")) { event.target.blur(); step(0); }
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inside = event.target.closest && event.target.closest("input, select, textarea, button, summary, a");
  if (inside && inside.matches("[type=range]") ? event.key.startsWith("Arrow") : inside && inside.matches("input:not([type=checkbox]), select, textarea")) return in_field(event);
  if (inside && (event.key === " " || event.key === "Enter")) return;
  const keys = keys_now(), act = Object.hasOwn(keys, event.key) ? keys[event.key] : null;
  if (act) { event.preventDefault(); act(); }
});
mark_kept();
show();
