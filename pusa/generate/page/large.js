// One video after the other, as large as the window: the quickest way to choose.
const SWIPE = 40; // pixels
let queue = [], at = 0, following_video = null, touched = null;
const plays = () => in_order().filter((card) => card.src);
// The drafts among what is shown, if there are any: they wait for a choice.
const to_review = () => {
  const shown = plays(), drafts = shown.filter((card) => card.state === "draft");
  return asked.state || !drafts.length ? shown : drafts;
};

const count_kept = () => {
  const on = is_kept(queue[at]);
  $("large-count").textContent = `${cards.filter(is_kept).length.toLocaleString("en")} kept`;
  $("large-keep").textContent = on ? "kept" : "keep";
  $("large-keep").setAttribute("aria-pressed", String(on));
};
const describe = (card) => {
  const text = (selector) => [...card.el.querySelectorAll(selector)].map((el) => el.textContent.trim());
  $("large-place").textContent = `${(at + 1).toLocaleString("en")} of ${queue.length.toLocaleString("en")}`;
  $("large-name").textContent = text("h3")[0];
  $("large-facts").textContent = [...text(".badge"), ...text(".warning"), ...text(".given"), ...text(".chips li"), ...text(".foot > span")].join(", ");
  $("large-prompt").textContent = text(".prompt")[0] || "";
  $("back").disabled = at === 0;
};
const video_of = (card) => {
  const video = new_video(card), picture = card.media.querySelector("img");
  if (picture) video.poster = picture.src;
  video.classList.toggle("small", card.media.classList.contains("small"));
  return video;
};
const empty_stage = () => {
  for (const video of [...$("stage").children]) empty(video);
  if (following_video) empty(following_video.video);
  following_video = null;
};
// After the last one: what to do with what is kept. From here on, `review` begins with the first one.
const show_end = () => {
  const number = cards.filter(is_kept).length;
  empty_stage();
  remember("reviewed", "");
  $("large-place").textContent = $("large-count").textContent = "";
  $("end-kept").textContent = number ? `${number.toLocaleString("en")} kept` : "nothing is kept";
  $("end-save").disabled = !number;
  if ($("end-copy")) $("end-copy").disabled = !cards.some((card) => is_kept(card) && card.state === "draft");
  $("back").disabled = false;
  $("end").focus();
};
const at_end = () => at === queue.length;
const show_large = () => {
  for (const id of ["stage", "large-name", "large-facts", "large-prompt", "large-keep", "next"]) $(id).hidden = at_end();
  $("end").hidden = !at_end();
  if (at_end()) return show_end();
  const card = queue[at], old = $("stage").firstElementChild, ready = following_video && following_video.card === card;
  const video = ready ? following_video.video : video_of(card);
  if (following_video && !ready) empty(following_video.video);
  if (old) empty(old);
  $("stage").replaceChildren(video);
  if (!CALM.matches || motion) play(video);
  const next = queue[at + 1];
  following_video = next ? { card: next, video: video_of(next) } : null; // loads meanwhile
  remember("reviewed", card.id);
  describe(card);
  count_kept();
};
const open_large = (list, card) => {
  if (!list.length) return;
  queue = list;
  at = Math.max(0, queue.indexOf(card));
  show_large();
  $("large").showModal();
  settle();
};
const turn = (by) => {
  const to = Math.min(queue.length, Math.max(0, at + by));
  if (to === at) { if (by < 0) say("this is the first one"); return; }
  at = to;
  show_large();
};
const keep_and_turn = () => {
  if (at_end()) return;
  keep(queue[at]);
  count_kept();
  if (is_kept(queue[at])) turn(1);
};
const toggle_large = () => {
  if (at_end()) return;
  const video = $("stage").firstElementChild;
  if (video.paused) play(video); else video.pause();
};
const LARGE_KEYS = {
  ArrowRight: () => turn(1), ArrowLeft: () => turn(-1), j: () => turn(1), k: () => turn(-1),
  " ": toggle_large, x: keep_and_turn, f: () => $("large").close(),
};

$("review").addEventListener("click", () => open_large(to_review(), by_id.get(remembered("reviewed"))));
$("back").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
$("large-keep").addEventListener("click", keep_and_turn);
$("end-save").addEventListener("click", save);
if ($("end-copy")) $("end-copy").addEventListener("click", copy_command);
$("end-again").addEventListener("click", () => turn(-queue.length));
$("stage").addEventListener("pointerdown", (event) => { touched = { x: event.clientX, y: event.clientY }; });
$("stage").addEventListener("pointerup", (event) => {
  if (!touched) return;
  const x = event.clientX - touched.x, y = event.clientY - touched.y;
  touched = null;
  if (Math.abs(x) > SWIPE && Math.abs(x) > 1.5 * Math.abs(y)) turn(x < 0 ? 1 : -1);
  else if (Math.hypot(x, y) < 10) toggle_large();
});
// A swipe that the browser takes for scrolling would swallow the next tap while it runs out.
$("stage").addEventListener("touchmove", (event) => { if (event.touches.length === 1) event.preventDefault(); }, { passive: false });
$("stage").addEventListener("pointercancel", () => { touched = null; });
$("large").addEventListener("close", () => {
  empty_stage();
  if (!at_end() && queue[at].shown) go(queue[at]);
  plan();
});
