"""Any text, in a terminal, in a log, on a page in markdown, and in the gallery."""

import io
import json
import re
from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from flows.console import STEERING, _Terminal
from pusa.generate.gallery import write_gallery
from pusa.system.text import markdown, printable, printable_lines
from tests.fuzz import examples
from tests.helpers.pages import Page, shown, shown_texts

MARKS = "![x](http://a.b/c.png) <img src=x> www.a.b me@a.b | `code` ``` ~~~ "
MARKS += "# --- 1. * _a_ &lt; &#33; \\\\ [^1]: <!-- --> :x:"
STEER = ("\x1b[2J", "\x1b]52;c;x\x07", "\x9b2J", "\r", "\n", "\t", "\u202e", "\u2028", "\udcff", "\x00", " ")
PIECES = st.sampled_from((*MARKS.split(" "), *STEER))
TEXTS = st.lists(PIECES | st.text(st.characters(), max_size=6), max_size=12).map("".join)
ADDRESS = re.compile(r"https?://|ftp://|www\.|[\w.+-]@\w", re.IGNORECASE)
FRAMES = ("{}", "- {}", "> {}", "a **x{}** b", "| a | b |\n|---|---|\n| {} | 2 |")  # ours, around a stranger's text
SHOWN = (["{}"], ["{}"], ["{}"], ["a x{} b"], ["a", "b", "{}", "2"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)
)
JOBS = st.dictionaries(st.sampled_from(("task", "prompt", "image")), VALUES)
FACTS = st.fixed_dictionaries({}, optional={"id": VALUES, "status": st.just("done"), "error": VALUES, "job": JOBS})
FACTS |= st.fixed_dictionaries(
    {"status": st.just("done")},
    optional={"job": JOBS, "levels": VALUES, "seams": VALUES, "given": VALUES, "model": VALUES, "warning": VALUES},
)
# What the page adds for a job, beside what it has for one without any file.
TAGS = {"article", "div", "h3", "span", "label", "button", "input", "p", "i", "ul", "li", "b", "a", "br"}
TAGS |= {"details", "summary", "table", "tr", "th", "td", "pre", "video", "noscript"}


@settings(deadline=None, max_examples=examples(80))
@given(TEXTS)
@example("http://evil.example/a.png")
@example("HTTPS://x.y www.x.y a@b.c")
def test_markdown_shows_any_text_as_it_is(text):
    expected = printable(text).strip()
    for frame, parts in zip(FRAMES, SHOWN, strict=True):
        page = frame.format(markdown(text))
        assert [part for part in shown(page) if part] == [
            part.format(expected) for part in parts if part != "{}" or expected
        ]
        assert not [piece for pieces in shown_texts(page) for piece in pieces if ADDRESS.search(piece)]


@settings(deadline=None, max_examples=examples(80))
@given(TEXTS)
def test_nothing_steers_a_terminal(text):
    line, lines = printable(text), printable_lines(text)
    assert line.isprintable() and all(part.isprintable() for part in re.split("[\n\t]", lines))
    assert printable(line) == line and printable_lines(lines) == lines
    stream = io.BytesIO()
    terminal = _Terminal(stream, "utf-8", "backslashreplace", newline="")
    terminal.write(text)
    terminal.flush()
    written = STEERING.sub("", stream.getvalue().decode())
    assert all(part.isprintable() for part in re.split("[\n\t]", written))


@settings(deadline=None, max_examples=examples(40))
@given(FACTS | VALUES)
@example({"job": {"prompt": "</figcaption><script>alert(1)</script>"}, "error": "<img src=http://a.b/c onerror=x>"})
def test_a_gallery_is_made_of_any_sidecar(tmp_path_factory, facts):
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.mp4").touch()
    (folder / "a.json").write_text(json.dumps(facts))
    page, plain = (Page(write_gallery(folder, [id]).read_text(encoding="utf-8")) for id in ("a", "none"))
    added = Counter(tag for tag, _ in page.tags) - Counter(tag for tag, _ in plain.tags)
    assert added.keys() <= TAGS
    assert [video["src"] for video in page.of("video")] in ([], ["a.mp4"])
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
