"use strict";
// The cards, and their videos: loaded near the window, played where they are seen, released when they are far.
const root = document.documentElement, $ = (id) => document.getElementById(id);
root.classList.add("js");
const PHONE = matchMedia("(max-width: 640px)"), CALM = matchMedia("(prefers-reduced-motion: reduce)");
const MOST_PLAYING = PHONE.matches ? 4 : 12; // browsers play only some videos at once
const REST = 150; // ms without scrolling, after which videos are loaded and started

const cards = [...document.querySelectorAll("article.card")].map((el, place) => ({
  el, place, id: el.dataset.id, state: el.dataset.state, task: el.dataset.task, home: el.parentNode,
  seam: Number(el.dataset.seam), at: Number(el.dataset.at), media: el.querySelector(".media"),
  src: (el.querySelector(".plays") || el).getAttribute("href") || "",
  box: el.querySelector(".keep input"), near: false, seen: 0, shown: true,
}));
const card_of = new Map(cards.map((card) => [card.el, card]));
const by_id = new Map(cards.map((card) => [card.id, card]));
const card_at = (target) => card_of.get(target.closest && target.closest("article.card")) || null;

// What the browser remembers of this run; where it may not (a private window), nothing.
const remembered = (name) => {
  try { return localStorage.getItem(`pusa ${document.body.dataset.run} ${name}`); } catch { return null; }
};
const remember = (name, value) => {
  try { localStorage.setItem(`pusa ${document.body.dataset.run} ${name}`, value); } catch { /* nothing */ }
};

// An open dialog covers and disables the rest of the page: what is to be seen or selected has to be in it.
const front = () => document.querySelector("dialog[open]") || document.body;
let hiding;
const say = (text) => {
  if ($("message").parentNode !== front()) front().append($("message"));
  $("message").textContent = text;
  $("message").classList.add("on");
  clearTimeout(hiding);
  hiding = setTimeout(() => $("message").classList.remove("on"), 2600);
};

const new_video = (card) => {
  const video = document.createElement("video");
  Object.assign(video, { muted: true, loop: true, playsInline: true, preload: "auto", src: card.src, tabIndex: -1 });
  video.setAttribute("aria-label", card.id);
  return video;
};
const empty = (video) => {
  video.pause();
  video.removeAttribute("src");
  video.load(); // frees the decoder
  video.remove();
};
const play = (video) => video.play().catch(() => {}); // refused where the browser saves power

let motion = remembered("motion") === null ? !CALM.matches : remembered("motion") === "yes";
let hovered = null, current = null, planned = 0, resting = 0;

const show_broken = (card) => {
  if (card.broken) return;
  card.broken = Object.assign(document.createElement("p"), { className: "broken", textContent: "the video cannot be played" });
  card.media.append(card.broken);
};
const load = (card) => {
  if (card.video || !card.src) return;
  const video = card.video = new_video(card);
  video.addEventListener("loadeddata", () => video.classList.add("ready"));
  video.addEventListener("error", () => { if (card.video === video) show_broken(card); });
  card.media.append(video);
};
const release = (card) => {
  if (!card.video) return;
  empty(card.video);
  card.video = null;
  if (card.broken) { card.broken.remove(); card.broken = null; }
};
const may_play = (card) => card.video && card.shown && !card.stopped
  && (card.wanted || card === hovered || (motion && card.seen >= 0.4));
const rank = (card) => (card === hovered || card === current ? 2 : 0) + card.seen;

// While the page scrolls, nothing is loaded, started or stopped: decoders and layers cost frames.
const settle = () => {
  planned = 0;
  if (resting) return;
  const still = document.hidden || Boolean(document.querySelector("dialog[open]"));
  for (const card of cards) if (card.near && card.shown) load(card); else release(card);
  const loaded = cards.filter((card) => card.video);
  const playing = new Set(still ? [] : loaded.filter(may_play).sort((a, b) => rank(b) - rank(a)).slice(0, MOST_PLAYING));
  for (const card of loaded) {
    if (playing.has(card) === card.video.paused) { if (card.video.paused) play(card.video); else card.video.pause(); }
    card.media.classList.toggle("paused", !playing.has(card) && Boolean(card.stopped || !motion));
  }
};
const plan = () => { planned = planned || requestAnimationFrame(settle); };
addEventListener("scroll", () => {
  clearTimeout(resting);
  resting = setTimeout(() => { resting = 0; plan(); }, REST);
}, { passive: true, capture: true });

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) card_of.get(target).near = isIntersecting;
  plan();
}, { rootMargin: "350px 100px" });
const seen = new IntersectionObserver((entries) => {
  for (const { target, intersectionRatio } of entries) card_of.get(target.parentNode).seen = intersectionRatio;
  plan();
}, { threshold: [0, 0.4, 0.8] });
for (const card of cards) {
  if (!card.src) continue;
  const { width, height } = card.media.dataset;
  if (width) {
    card.media.style.aspectRatio = `${width} / ${height}`;
    card.media.classList.toggle("small", Math.max(width, height) < 200);
  }
  card.media.append(Object.assign(document.createElement("span"), { className: "mark" }));
  near.observe(card.el);
  seen.observe(card.media);
}

const toggle = (card) => {
  if (!card || !card.src) return;
  load(card);
  card.wanted = card.video.paused;
  card.stopped = !card.wanted;
  settle();
};
const set_motion = (on) => { motion = on; $("motion").setAttribute("aria-pressed", String(on)); };
const turn_motion = () => {
  set_motion(!motion);
  remember("motion", motion ? "yes" : "no");
  for (const card of cards) card.stopped = card.wanted = false;
  settle();
};
set_motion(motion);
$("motion").addEventListener("click", turn_motion);
document.addEventListener("visibilitychange", plan);
document.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "mouse" || card_at(event.target) === hovered) return;
  hovered = card_at(event.target);
  plan();
});
