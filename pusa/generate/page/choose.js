// Which cards are shown, in which order, and which are kept.
const asked = { state: "", task: "", words: [] };
const text_of = (card) => (card.text = card.text || `${card.id} ${card.el.textContent}`.toLowerCase());
const is_kept = (card) => Boolean(card.box && card.box.checked);
const has_state = (card, state) => !state || (state === "kept" ? is_kept(card) : card.state === state);
const has_task = (card) => !asked.task || card.task === asked.task;
const has_words = (card) => asked.words.every((word) => text_of(card).includes(word));
const in_order = () => (
  $("sort").value ? [...$("flat").children].map((el) => card_of.get(el)) : cards
).filter((card) => card.shown);

const show = () => {
  const counts = new Map(), tasks = new Map(), add = (map, key) => map.set(key, (map.get(key) || 0) + 1);
  for (const card of cards) {
    const [words, task, state] = [has_words(card), has_task(card), has_state(card, asked.state)];
    card.shown = words && task && state;
    card.el.hidden = !card.shown;
    if (words && task) for (const name of ["", card.state, ...(is_kept(card) ? ["kept"] : [])]) add(counts, name);
    if (words && state) add(tasks, card.task);
  }
  for (const button of document.querySelectorAll("#bar [data-state]")) {
    button.querySelector("span").textContent = (counts.get(button.dataset.state) || 0).toLocaleString("en");
    button.setAttribute("aria-pressed", String(button.dataset.state === asked.state));
  }
  for (const option of document.querySelectorAll("#task option[data-name]")) {
    option.textContent = `${option.value} (${tasks.get(option.value) || 0})`;
  }
  for (const part of document.querySelectorAll("section, section .cell, section .part, .grid tbody tr")) {
    part.hidden = !part.querySelector("article.card:not([hidden])");
  }
  $("nothing").hidden = !cards.length || cards.some((card) => card.shown);
  plan();
  tell();
};
const ask = (state) => { asked.state = asked.state === state ? "" : state; show(); };
const clear = () => {
  Object.assign(asked, { state: "", task: "", words: [] });
  $("search").value = "";
  if ($("task")) $("task").value = "";
  show();
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
  typing = setTimeout(() => {
    asked.words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    show();
  }, 120);
});
$("bar").addEventListener("click", (event) => {
  const button = event.target.closest("[data-state]");
  if (button) ask(button.dataset.state);
});
if ($("task")) $("task").addEventListener("change", () => { asked.task = $("task").value; show(); });
$("sort").addEventListener("change", sort);
const set_size = (value) => { root.style.setProperty("--size", `${value}px`); $("size").value = value; };
set_size(Math.min(760, Math.max(160, Number(remembered("size")) || 300)));
$("size").addEventListener("input", () => { set_size($("size").value); remember("size", $("size").value); });

// What is kept outlasts a reload.
const tell = () => {
  const kept = cards.filter(is_kept).length, drafts = cards.filter((card) => card.state === "draft");
  $("count").textContent = kept || !drafts.length ? `${kept.toLocaleString("en")} kept` : `${drafts.length.toLocaleString("en")} drafts`;
  $("count").disabled = !kept && asked.state !== "kept";
  $("count").setAttribute("aria-pressed", String(asked.state === "kept"));
  $("chosen").hidden = !kept && !drafts.length && asked.state !== "kept";
  $("save").disabled = !kept;
  $("review").classList.toggle("strong", !kept);
  $("review").classList.toggle("wide", asked.state === "kept");
  $("keep-none").hidden = !kept;
  $("keep-none").classList.toggle("wide", asked.state !== "kept"); // on a phone only where all that is kept is seen
  if ($("copy")) $("copy").disabled = !drafts.some(is_kept);
};
const mark_kept = () => { for (const card of cards) card.el.classList.toggle("kept", is_kept(card)); };
const keep_changed = () => {
  mark_kept();
  remember("kept", JSON.stringify(cards.filter(is_kept).map((card) => card.id)));
  if (asked.state === "kept") { if (!cards.some(is_kept)) asked.state = ""; show(); } else tell();
  $("bar").querySelector("[data-state=kept] span").textContent = cards.filter(is_kept).length.toLocaleString("en");
};
const keep = (card, on = !is_kept(card)) => { if (card && card.box) { card.box.checked = on; keep_changed(); } };
try {
  const ids = JSON.parse(remembered("kept") || "[]");
  for (const id of Array.isArray(ids) ? ids : []) { const card = by_id.get(id); if (card && card.box) card.box.checked = true; }
} catch { /* not a value of this page */ }
document.addEventListener("change", (event) => { if (event.target.closest(".keep")) keep_changed(); });
$("count").addEventListener("click", () => { ask("kept"); scrollTo(0, 0); });
$("keep-shown").addEventListener("click", () => {
  for (const card of to_review()) card.box.checked = true;
  keep_changed();
});
$("keep-none").addEventListener("click", () => {
  for (const card of cards) if (card.box) card.box.checked = false;
  keep_changed();
});

// What is kept, for `pusa finish`.
const save = async () => {
  const ids = cards.filter(is_kept).map((card) => `${card.id}\n`);
  const files = [new File(ids, "chosen.txt", { type: "text/plain" })];
  if (PHONE.matches && navigator.canShare && navigator.canShare({ files })) { // only on https or this machine
    try { await navigator.share({ files }); return; } catch (error) { if (error.name === "AbortError") return; }
  }
  const href = URL.createObjectURL(new Blob(ids, { type: "text/plain" }));
  Object.assign(document.createElement("a"), { href, download: "chosen.txt" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
  say("saved as chosen.txt, one id a line");
};
$("save").addEventListener("click", save);
const copy = async (text) => {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* only on https or this machine */ }
  const area = Object.assign(document.createElement("textarea"), { value: text });
  front().append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
};
const LONGEST_COMMAND = 20000; // characters; shells take more, but nobody pastes it
const copy_command = async () => {
  const ids = cards.filter((card) => is_kept(card) && card.state === "draft").map((card) => card.id);
  const whole = `${document.body.dataset.command} ${ids.join(" ")}`;
  const text = whole.length > LONGEST_COMMAND ? `${document.body.dataset.command} --list chosen.txt` : whole;
  say((await copy(text)) ? `copied: ${text.length > 140 ? `${text.slice(0, 140)}...` : text}` : text);
};
if ($("copy")) $("copy").addEventListener("click", copy_command);
