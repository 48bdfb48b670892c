"use strict";
(() => {
const root = document.documentElement, $ = (id) => document.getElementById(id);
root.classList.add("js");
const PHONE = matchMedia("(max-width: 640px)"), CALM = matchMedia("(prefers-reduced-motion: reduce)");
const MOST_PLAYING = PHONE.matches ? 4 : 12; // browsers play only some videos at once
const cards = [...document.querySelectorAll("article.card")].map((el, place) => ({
  el, place, id: el.dataset.id, state: el.dataset.state, task: el.dataset.task, home: el.parentNode,
  seam: Number(el.dataset.seam), at: Number(el.dataset.at), media: el.querySelector(".media"),
  tick: el.querySelector(".tick input"), near: false, seen: 0, shown: true,
}));
const card_of = new Map(cards.map((card) => [card.el, card]));
const by_id = new Map(cards.map((card) => [card.id, card]));

// What the browser remembers of this run; where it may not, nothing.
const remembered = (name) => { try { return localStorage.getItem(`pusa ${document.body.dataset.run} ${name}`); } catch { return null; } };
const remember = (name, value) => { try { localStorage.setItem(`pusa ${document.body.dataset.run} ${name}`, value); } catch { /* private window */ } };
let hiding;
const say = (text) => {
  $("message").textContent = text;
  $("message").classList.add("on");
  clearTimeout(hiding);
  hiding = setTimeout(() => $("message").classList.remove("on"), 2600);
};

// Videos: loaded near the window, played where they are seen, released when they are far.
let motion = remembered("motion") === null ? !CALM.matches : remembered("motion") === "yes";
let hovered = null, current = null, planned = 0;

const load = (card) => {
  if (card.video || !card.media || !card.media.dataset.src) return;
  const video = document.createElement("video");
  Object.assign(video, { muted: true, loop: true, playsInline: true, preload: "auto", src: card.media.dataset.src, tabIndex: -1 });
  video.addEventListener("loadeddata", () => video.classList.add("ready"));
  video.addEventListener("error", () => {
    if (card.video !== video || card.broken) return;
    card.broken = document.createElement("p");
    card.broken.className = "broken";
    card.broken.textContent = "the video cannot be played";
    card.media.append(card.broken);
  });
  card.video = video;
  card.media.append(video);
};
const release = (card) => {
  const video = card.video;
  if (!video || document.fullscreenElement === video) return;
  card.video = null;
  video.pause();
  video.removeAttribute("src");
  video.load();
  video.remove();
  if (card.broken) { card.broken.remove(); card.broken = null; }
};
const settle = () => {
  planned = 0;
  const first = (card) => (card === hovered || card === current ? 2 : 0) + card.seen;
  const wanted = cards.filter((card) => card.video && card.shown && !card.stopped && !document.hidden && !$("compare").open
    && (card.wanted || card === hovered || (motion && card.seen >= 0.4)));
  const playing = new Set(wanted.sort((a, b) => first(b) - first(a)).slice(0, MOST_PLAYING));
  for (const card of cards) {
    if (!card.video) continue;
    if (playing.has(card)) { if (card.video.paused) card.video.play().catch(() => {}); } else if (!card.video.paused && document.fullscreenElement !== card.video) card.video.pause();
    card.media.classList.toggle("paused", !playing.has(card) && (card.stopped || !motion));
  }
};
const plan = () => { planned = planned || requestAnimationFrame(settle); };
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const card = card_of.get(target);
    card.near = isIntersecting;
    clearTimeout(card.timer);
    // What only flies past is not loaded.
    card.timer = setTimeout(() => { if (card.near && card.shown) load(card); else release(card); plan(); }, isIntersecting ? 140 : 400);
  }
}, { rootMargin: "350px 100px" });
const seen = new IntersectionObserver((entries) => {
  for (const { target, intersectionRatio } of entries) card_of.get(target).seen = intersectionRatio;
  plan();
}, { threshold: [0, 0.2, 0.4, 0.6, 0.8, 1] });
for (const card of cards) {
  if (!card.media) continue;
  const { width, height, src } = card.media.dataset;
  if (width && src) {
    card.media.style.aspectRatio = `${width} / ${height}`;
    card.media.classList.toggle("small", Math.max(width, height) < 200);
  }
  if (!src) continue;
  const mark = document.createElement("span");
  mark.className = "mark";
  card.media.append(mark);
  near.observe(card.el);
  seen.observe(card.el);
}
const toggle = (card) => {
  if (!card || !card.media || !card.media.dataset.src) return;
  load(card);
  if (card.video.paused) { card.wanted = true; card.stopped = false; } else { card.wanted = false; card.stopped = true; }
  settle();
};
const full = (card) => {
  if (!card || !card.media || !card.media.dataset.src) return;
  load(card);
  const video = card.video;
  video.controls = true;
  const entered = video.requestFullscreen ? video.requestFullscreen() : video.webkitEnterFullscreen ? video.webkitEnterFullscreen() : undefined;
  if (entered) entered.catch(() => { video.controls = false; });
  card.stopped = false;
  card.wanted = true;
  video.play().catch(() => {});
};
document.addEventListener("fullscreenchange", () => {
  if (document.fullscreenElement) return;
  for (const card of cards) if (card.video) card.video.controls = false;
  plan();
});
document.addEventListener("visibilitychange", plan);
document.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "mouse") return;
  const card = card_of.get(event.target.closest && event.target.closest("article.card")) || null;
  if (card !== hovered) { hovered = card; plan(); }
});

// Which cards are shown, and in which order.
const asked = { state: "", task: "", words: [] };
const text_of = (card) => (card.text = card.text || card.el.textContent.toLowerCase());
const is_kept = (card) => Boolean(card.tick && card.tick.checked);
const has_state = (card, state) => !state || (state === "kept" ? is_kept(card) : card.state === state);
const has_task = (card) => !asked.task || card.task === asked.task;
const has_words = (card) => asked.words.every((word) => text_of(card).includes(word));
const show = () => {
  const counts = new Map(), tasks = new Map();
  let count = 0;
  for (const card of cards) {
    const [words, task, state] = [has_words(card), has_task(card), has_state(card, asked.state)];
    const shown = words && task && state;
    if (card.shown !== shown) { card.shown = shown; card.el.hidden = !shown; }
    count += shown;
    if (words && task) for (const name of ["", card.state, ...(is_kept(card) ? ["kept"] : [])]) counts.set(name, (counts.get(name) || 0) + 1);
    if (words && state) tasks.set(card.task, (tasks.get(card.task) || 0) + 1);
  }
  for (const button of document.querySelectorAll("#bar [data-state]")) {
    button.querySelector("span").textContent = (counts.get(button.dataset.state) || 0).toLocaleString("en");
    button.setAttribute("aria-pressed", String(button.dataset.state === asked.state));
  }
  for (const option of document.querySelectorAll("#task option[value]:not([value=''])")) option.textContent = `${option.value} (${tasks.get(option.value) || 0})`;
  for (const part of document.querySelectorAll("section, section .cell, section .part, .grid tbody tr")) {
    part.hidden = !part.querySelector("article.card:not([hidden])");
  }
  $("nothing").hidden = count > 0 || !cards.length;
  plan();
  tell();
};
const sort = () => {
  const key = $("sort").value;
  if (key) $("flat").append(...[...cards].sort((a, b) => b[key] - a[key] || a.place - b.place).map((card) => card.el));
  else for (const card of cards) card.home.append(card.el);
  $("flat").hidden = !key;
  $("sections").hidden = Boolean(key);
  show();
};
let typing;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => { asked.words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean); show(); }, 120);
});
$("bar").addEventListener("click", (event) => {
  const button = event.target.closest("[data-state]");
  if (button) { asked.state = asked.state === button.dataset.state ? "" : button.dataset.state; show(); }
});
if ($("task")) $("task").addEventListener("change", () => { asked.task = $("task").value; show(); });
$("sort").addEventListener("change", sort);
const set_size = (value) => { root.style.setProperty("--size", `${value}px`); $("size").value = value; };
set_size(Math.min(760, Math.max(160, Number(remembered("size")) || 300)));
$("size").addEventListener("input", () => { set_size($("size").value); remember("size", $("size").value); });

// What is kept: ticks outlast a reload.
const tell = () => {
  const kept = cards.filter(is_kept), drafts = kept.filter((card) => card.state === "draft").length;
  const of_all = cards.filter((card) => card.state === "draft").length;
  $("count").textContent = kept.length ? `${kept.length.toLocaleString("en")} kept${of_all ? `, ${drafts} of ${of_all} drafts` : ""}` : `${of_all} draft${of_all === 1 ? "" : "s"}: tick those to finish`;
  $("chosen").hidden = !kept.length && !of_all;
  $("save").disabled = !kept.length;
  $("untick").hidden = !kept.length;
  if ($("copy")) $("copy").disabled = !drafts;
};
const keep = () => {
  for (const card of cards) card.el.classList.toggle("kept", is_kept(card));
  remember("kept", JSON.stringify(cards.filter(is_kept).map((card) => card.id)));
  if (asked.state === "kept") show(); else { $("bar").querySelector("[data-state=kept] span").textContent = cards.filter(is_kept).length; tell(); }
};
try {
  const ids = JSON.parse(remembered("kept") || "[]");
  if (Array.isArray(ids)) for (const id of ids) { const card = by_id.get(id); if (card && card.tick) card.tick.checked = true; }
} catch { /* somebody else's value */ }
document.addEventListener("change", (event) => { if (event.target.closest(".tick")) keep(); });
$("tick-all").addEventListener("click", () => {
  const drafts = cards.some((card) => card.shown && card.tick && card.state === "draft");
  for (const card of cards) if (card.shown && card.tick && (!drafts || asked.state || card.state === "draft")) card.tick.checked = true;
  keep();
});
$("untick").addEventListener("click", () => { for (const card of cards) if (card.tick) card.tick.checked = false; keep(); });
$("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([cards.filter(is_kept).map((card) => `${card.id}\n`).join("")], { type: "text/plain" }));
  link.download = "chosen.txt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say("saved as chosen.txt, one id a line");
});
const copy = async (text) => {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* only on https or this machine */ }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
};
if ($("copy")) $("copy").addEventListener("click", async () => {
  const ids = cards.filter((card) => is_kept(card) && card.state === "draft").map((card) => card.id);
  const text = `${document.body.dataset.command} ${ids.length > 30 ? "--list chosen.txt" : ids.join(" ")}`;
  say((await copy(text)) ? `copied: ${text.length > 140 ? `${text.slice(0, 140)}...` : text}` : text);
});

// Two side by side, at the same moment.
let pair = [], looking = 0;
const choose = (card) => {
  if (!card || !card.media || !card.media.dataset.src) return;
  pair = pair.includes(card) ? pair.filter((other) => other !== card) : [...pair, card].slice(-2);
  mark_pair();
  if (pair.length === 2) compare(); else if (pair.length) say(`${card.id}: choose another to compare it with`);
};
const mark_pair = () => { for (const card of cards) { const button = card.el.querySelector("[data-act=compare]"); if (button) button.setAttribute("aria-pressed", String(pair.includes(card))); } };
const rows_of = (card) => new Map([["id", card.id], ...[...card.el.querySelectorAll(".more tr:not(.fact)")].map((row) => [row.cells[0].textContent, row.cells[1].textContent]), ["given", (card.el.querySelector(".given") || {}).textContent || ""]]);
const compare = () => {
  const [a, b] = pair.map((card) => {
    const video = document.createElement("video");
    Object.assign(video, { muted: true, playsInline: true, preload: "auto", src: card.media.dataset.src });
    video.setAttribute("aria-label", card.id);
    return video;
  });
  a.loop = true;
  $("pair").replaceChildren(a, b);
  $("pair").classList.toggle("small", pair.every((card) => card.media.classList.contains("small")));
  $("names").textContent = `${pair[0].id}  |  ${pair[1].id}`;
  const [left, right] = pair.map(rows_of);
  const differing = [...new Set([...left.keys(), ...right.keys()])].filter((key) => left.get(key) !== right.get(key));
  $("differences").replaceChildren(...differing.map((key) => {
    const row = document.createElement("tr");
    for (const [kind, text] of [["th", key], ["td", left.get(key) || ""], ["td", right.get(key) || ""]]) row.append(Object.assign(document.createElement(kind), { textContent: text }));
    return row;
  }));
  set_wipe();
  $("compare").showModal();
  settle();
  if (motion) a.play().catch(() => {});
  const follow = () => {
    if (!$("compare").open) return;
    const moment = Math.min(a.currentTime, Math.max(0, (b.duration || 0) - 0.01));
    if (b.readyState && !b.seeking && Math.abs(b.currentTime - moment) > (a.paused ? 0.005 : 0.06)) b.currentTime = moment;
    if (a.paused !== b.paused) { if (a.paused) b.pause(); else if (moment === a.currentTime) b.play().catch(() => {}); }
    if (a.duration && document.activeElement !== $("moment")) $("moment").value = 1000 * a.currentTime / a.duration;
    $("pair-play").textContent = a.paused ? "play" : "pause";
    looking = requestAnimationFrame(follow);
  };
  cancelAnimationFrame(looking);
  follow();
};
const set_wipe = () => {
  const on = $("mode").getAttribute("aria-pressed") === "true", [, over] = $("pair").children;
  $("pair").classList.toggle("wiped", on);
  $("wipe").hidden = !on;
  if (over) over.style.clipPath = on ? `inset(0 0 0 ${$("wipe").value}%)` : "none";
};
$("mode").addEventListener("click", () => { $("mode").setAttribute("aria-pressed", String($("mode").getAttribute("aria-pressed") !== "true")); set_wipe(); });
$("wipe").addEventListener("input", set_wipe);
$("pair").addEventListener("pointermove", (event) => {
  if ($("wipe").hidden) return;
  const box = $("pair").lastElementChild.getBoundingClientRect();
  $("wipe").value = 100 * (event.clientX - box.left) / box.width;
  set_wipe();
});
$("moment").addEventListener("input", () => { const [a] = $("pair").children; a.pause(); if (a.duration) a.currentTime = Math.min(a.duration - 0.001, $("moment").value / 1000 * a.duration); });
const pair_toggle = () => { const [a] = $("pair").children; if (a.paused) a.play().catch(() => {}); else a.pause(); $("moment").blur(); };
$("pair-play").addEventListener("click", pair_toggle);
$("compare").addEventListener("close", () => {
  for (const video of $("pair").children) { video.pause(); video.removeAttribute("src"); video.load(); }
  $("pair").replaceChildren();
  pair = [];
  mark_pair();
  plan();
});
for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// Pointer and keyboard.
const go = (card) => {
  if (!card) return;
  if (current) current.el.classList.remove("current");
  current = card;
  card.el.classList.add("current");
  card.el.focus({ preventScroll: true });
  const { top, bottom } = card.el.getBoundingClientRect(), bar = $("bar").offsetHeight;
  if (top < bar || bottom > innerHeight - 60) card.el.scrollIntoView({ block: bottom - top > innerHeight - bar ? "start" : "center", inline: "nearest" });
  plan();
};
const in_order = () => [...document.querySelectorAll("main article.card:not([hidden])")].filter((el) => el.offsetParent).map((el) => card_of.get(el));
const step = (by) => { const list = in_order(), at = list.indexOf(current); go(list[at < 0 ? 0 : Math.min(list.length - 1, Math.max(0, at + by))]); };
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
document.addEventListener("click", (event) => {
  const card = card_of.get(event.target.closest("article.card"));
  const anchor = event.target.closest("a[href^='#job-']");
  if (anchor) {
    const target = document.getElementById(decodeURIComponent(anchor.hash.slice(1)));
    if (target && target.hidden) clear();
    if (target) { event.preventDefault(); go(card_of.get(target)); }
  }
  if (!card) return;
  if (current !== card) { if (current) current.el.classList.remove("current"); current = null; }
  const button = event.target.closest("[data-act]");
  if (button) { if (button.dataset.act === "compare") choose(card); else full(card); }
  else if (event.target.closest(".media") && document.fullscreenElement !== card.video) toggle(card);
  else if (event.target.closest(".prompt")) event.target.closest(".prompt").classList.toggle("whole");
});
document.addEventListener("dblclick", (event) => { if (event.target.closest(".media")) full(card_of.get(event.target.closest("article.card"))); });
document.addEventListener("focusin", (event) => {
  const card = card_of.get(event.target.closest && event.target.closest("article.card"));
  if (card && card !== current && event.target.matches(":focus-visible")) { if (current) current.el.classList.remove("current"); current = card; card.el.classList.add("current"); }
});
const set_motion = (on) => { motion = on; $("motion").setAttribute("aria-pressed", String(on)); };
const turn_motion = () => { set_motion(!motion); remember("motion", motion ? "yes" : "no"); for (const card of cards) { card.stopped = false; card.wanted = false; } settle(); };
const set_theme = (theme) => { if (theme) root.dataset.theme = theme; else delete root.dataset.theme; $("theme").setAttribute("aria-label", `theme: ${theme || "as the system"}`); };
const turn_theme = () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const own = root.dataset.theme !== undefined && dark === !matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = own ? "" : dark ? "light" : "dark";
  set_theme(theme);
  try { localStorage.setItem("pusa theme", theme); } catch { /* private window */ }
};
try { const theme = localStorage.getItem("pusa theme"); set_theme(theme === "light" || theme === "dark" ? theme : ""); } catch { set_theme(""); }
set_motion(motion);
$("motion").addEventListener("click", turn_motion);
$("theme").addEventListener("click", turn_theme);
$("help-button").addEventListener("click", () => $("help").showModal());
const clear = () => {
  Object.assign(asked, { state: "", task: "", words: [] });
  $("search").value = "";
  if ($("task")) $("task").value = "";
  show();
};
const KEYS = {
  j: () => step(1), k: () => step(-1), ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => move(true), ArrowUp: () => move(false),
  " ": () => { if (current) toggle(current); else step(1); }, x: () => { if (current && current.tick) { current.tick.checked = !current.tick.checked; keep(); } },
  c: () => choose(current), f: () => full(current), "/": () => $("search").focus(), p: turn_motion, d: turn_theme, "?": () => $("help").showModal(),
  s: () => { const more = current && current.el.querySelector(".more"); if (more) more.open = !more.open; },
  Escape: () => { if (pair.length) { pair = []; mark_pair(); } else if (asked.state || asked.task || asked.words.length) clear(); else if (current) { current.el.classList.remove("current"); current.el.blur(); current = null; plan(); } },
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.fullscreenElement) return;
  const inside = event.target.closest && event.target.closest("input, select, textarea, button, summary, a, video[controls]");
  if ($("compare").open) {
    if (event.key === " " && !(inside && inside.matches("button"))) { event.preventDefault(); pair_toggle(); }
    if (event.key === "w" && !(inside && inside.matches("input[type=search]"))) $("mode").click();
    return;
  }
  if ($("help").open) return;
  if (inside && inside.matches("input:not([type=checkbox]), select, textarea")) {
    if (event.key === "Escape") { inside.blur(); if (inside === $("search")) clear(); }
    if (event.key === "Enter" && inside === $("search")) { inside.blur(); step(0); }
    return;
  }
  if (inside && (event.key === " " || event.key === "Enter")) return;
  const act = Object.hasOwn(KEYS, event.key) ? KEYS[event.key] : null;
  if (act) { event.preventDefault(); act(); }
});
for (const card of cards) card.el.classList.toggle("kept", is_kept(card));
show();
})();
