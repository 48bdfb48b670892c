"""The gallery shows each job as its files are, whatever they hold, and texts as texts; only its own script can act."""

import json
import os
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest

from flows.run_folders import POLICY
from pusa.generate import page as page_files
from pusa.generate.gallery import MOST_JOBS, LiveGallery, write_gallery, write_sheet
from pusa.system.files import own_digest
from pusa.video.media import read_image, write_video
from tests.helpers.pages import Page

HOSTILE = "</style></script><script>alert(1)</script><img src=http://a.b/c.png onerror=x>\x1b[2J\u202e\ud800'\""
DEEP = "[" * 900 + "]" * 900
SIDECARS = {
    "no JSON": b"\x00\xff",
    "a list": b"[1]",
    "a text": b'"done"',
    "other types": b'{"id": [1], "status": ["done"], "error": {"a": 1}, "job": [1]}',
    "a job of other types": b'{"status": "done", "job": {"task": [1], "prompt": {"a": 1}, "seed": 1e999, "width": ""}}',
    "facts of other types": b'{"status": "done", "job": {"task": "loop"}, "levels": {"given": {"0": "x"}, "starts": []}'
    b', "seams": {"0": NaN, "1": [], "2": 1e400}, "seconds": [1], "model": [1], "failure": 3, "made_at": 7}',
    "very many of each": json.dumps(
        {
            "status": "done", "job": {f"k{n}": n for n in range(50_000)}, "seams": {str(n): 3 for n in range(50_000)},
            "levels": {"given": {str(n): n / 50_000 for n in range(50_000)}, "starts": [0] * 50_000},
        }
    ).encode(),
    "a deep job": f'{{"job": {{"image": {DEEP}, "prompt": {DEEP}}}, "error": {DEEP}}}'.encode(),
    "too deep": b"[" * 100_000,
    "a long error": json.dumps({"error": "x" * 1_000_000, "traceback": "y\n" * 1_000_000}).encode(),
    "hostile": json.dumps(
        {"id": HOSTILE, "error": HOSTILE, "job": dict.fromkeys(("task", "prompt", HOSTILE), HOSTILE)}
    ).encode(),
    "hostile facts": json.dumps(
        {
            "status": "done", "warning": HOSTILE, "seams": {HOSTILE: 3}, "given": [HOSTILE],
            "lineage": {HOSTILE: HOSTILE}, "model": {HOSTILE: [HOSTILE]}, "made_by": HOSTILE,
            "levels": {"given": {HOSTILE: 0.5}, "starts": [0]},
        }
    ).encode(),
}  # fmt: skip
JOB = {"task": "image_to_video", "prompt": "a boat", "image": "/a/still.png", "seed": 3, "steps": 8, "fit": "crop"}


class Source(HTMLParser):
    """The contents of the elements of one name, as a browser hashes them."""

    def __init__(self, html: str, name: str) -> None:
        super().__init__()
        self.name, self.inside, self.contents = name, False, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == self.name
        self.contents += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.contents[-1] += data


def put(folder, id, *ends, where="", **record):
    """Write a record, and empty files beside it."""
    (folder / where).mkdir(exist_ok=True)
    (folder / where / f"{id}.json").write_text(json.dumps({"status": "done", "job": JOB, **record}))
    for end in ends:
        (folder / where / f"{id}{end}").touch()


def put_list(folder, jobs):
    """Write the list of a manifest's jobs: id -> key and settings."""
    (folder / ".work").mkdir()
    rows = [{"id": id, "key": key, "latents_key": "", "settings": settings} for id, (key, settings) in jobs.items()]
    content = {"version": 1, "weights": {}, "jobs": rows}
    (folder / ".work/jobs.json").write_text(json.dumps({**content, "sha256": own_digest(content)}))


def cards(page: Page) -> dict[str, dict]:
    return {tag["data-id"]: tag for tag in page.of("article")}


def page_of(folder, *ids) -> Page:
    return Page(write_gallery(folder, list(ids)).read_text(encoding="utf-8"))


@pytest.mark.parametrize("content", SIDECARS.values(), ids=SIDECARS)
def test_a_record_of_another_shape_is_shown_as_far_as_it_goes(tmp_path, content):
    empty = len(write_gallery(tmp_path, ["a", "missing"]).read_text())
    (tmp_path / "drafts").mkdir()
    for name in ("a.json", "drafts/a.json"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.mp4").touch()
    text = write_gallery(tmp_path, ["a", "missing"]).read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < empty + 30_000 and text.isascii()
    assert [len(page.of(name)) for name in ("script", "style", "article")] == [1, 1, 2]
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, tag in page.tags for name in tag if name.startswith("on") or name == "style"]
    assert cards(page)["missing"]["data-state"] == "waiting" and "not made" in page.text
    assert read_image(write_sheet(tmp_path, ["a", "missing"])).shape == (1, 1, 1, 3)


def test_only_the_pages_own_script_and_style_act_and_nothing_is_loaded_but_the_files_beside_it(tmp_path):
    put(tmp_path, "a", ".mp4", job={**JOB, "prompt": HOSTILE})
    text = write_gallery(tmp_path, ["a"]).read_text()
    page = Page(text)
    (meta,) = (tag["content"] for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    policy = dict(part.split(" ", 1) for part in meta.split("; "))
    hashes = {}
    for name in ("script", "style"):
        (content,) = Source(text, name).contents
        hashes[name] = f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
    assert policy == {
        "default-src": "'none'", "media-src": "'self' file:", "img-src": "'self' file: data:",
        "style-src": hashes["style"], "script-src": hashes["script"], "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert f"; script-src {hashes['script']};" in POLICY  # of a server that shows run folders
    addresses = [value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href", "data-src")]
    assert addresses and not [address for address in addresses if ":" in address or address.startswith("/")]


def test_every_state_is_shown(tmp_path):
    jobs = ("done", "draft", "failed", "again", "stale", "gone", "sampled", "live", "pending", "old-draft")
    put_list(tmp_path, {id: ("k", JOB) for id in jobs})
    for name in ("previews", "drafts"):
        (tmp_path / name).mkdir()
    put(tmp_path, "done", ".mp4", ".latents.safetensors", ".webm", ".frames", key="k")
    put(
        tmp_path,
        "draft",
        ".mp4",
        where="drafts",
        status="draft",
        key="k",
        steps=8,
        total_steps=20,
        shows={"pass": 1, "passes": 2},
    )
    put(tmp_path, "old-draft", ".mp4", where="drafts", status="draft", key="other")
    put(tmp_path, "failed", status="failed", error="it is torn", traceback="Traceback\n  line 3")
    put(tmp_path, "again", ".mp4", key="k", failure={"error": "it was torn", "traceback": "there"})
    put(tmp_path, "stale", ".mp4", key="another")
    put(tmp_path, "gone", key="k")
    (tmp_path / ".work/sampled.latents.safetensors").touch()
    (tmp_path / "previews/live.jpg").touch()
    page = page_of(tmp_path, *jobs)
    states = {id: tag["data-state"] for id, tag in cards(page).items()}
    waiting = dict.fromkeys(("stale", "gone", "sampled", "live", "pending", "old-draft"), "waiting")
    assert states == {"done": "done", "draft": "draft", "failed": "failed", "again": "failed", **waiting}
    for text in (
        "step 8 of 20 (pass 1 of 2)", "it is torn", "line 3", "of an earlier run; the last one failed: it was torn",
        "being sampled", "sampled, to be decoded", "earlier settings", "its video is gone",
        "10 jobs, 1 done, 1 draft, 2 failed, 6 waiting",
    ):  # fmt: skip
        assert text in page.text
    videos = [tag["src"] for tag in page.of("video")]
    assert videos == ["done.mp4", "drafts/draft.mp4", "again.mp4", "stale.mp4", "drafts/old-draft.mp4"]
    links = {tag["href"] for tag in page.of("a")}
    assert links >= {"done.mp4", "done.json", "done.latents.safetensors", "done.webm", "done.frames/00000.png"}
    assert links >= {"drafts/draft.mp4", "drafts/draft.json", "#job-failed", "#job-again"}
    ticks = [tag["value"] for tag in page.of("input") if tag.get("type") == "checkbox"]
    assert set(ticks) == {"done", "draft", "again", "stale", "old-draft"}


@pytest.mark.parametrize("rows", [None, 5, [1], [{}], [{"id": [1]}], [{"id": "a"}], [{"id": "a", "settings": [1]}]])
def test_a_list_of_jobs_of_another_shape_hides_no_job(tmp_path, rows):
    (tmp_path / ".work").mkdir()
    content = {"version": 1, "weights": {}, "jobs": rows, "manifest": rows}
    (tmp_path / ".work/jobs.json").write_text(json.dumps({**content, "sha256": own_digest(content)}))
    put(tmp_path, "b", ".mp4")
    assert cards(page_of(tmp_path, "a", "b")).keys() == {"a", "b"}


def test_without_the_script_every_video_has_controls_and_nothing_is_hidden(tmp_path):
    put(tmp_path, "a", ".mp4")
    page = page_of(tmp_path, "a")
    (video,) = page.of("video")
    assert {"controls", "muted", "loop"} <= video.keys() and video["preload"] == "none"
    hidden = [tag for name, tag in page.tags if "hidden" in tag and name not in ("aside", "input")]
    assert [tag["id"] for tag in hidden] == ["nothing", "flat", "end"]  # the last one is in a dialog
    assert "a boat" in page.text and "image_to_video" in page.text


def test_the_level_strip_has_a_cell_for_each_latent_frame(tmp_path):
    given = {"0": 0, "2": 0.3, "5": 0.96, "9": 0.1, "3": True}
    put(tmp_path, "a", ".mp4", levels={"given": given, "starts": [0] * 6, "schedule": [1, 0]})
    put(tmp_path, "older", ".mp4", given=["still.png: latent frame 0, multiplier 0"])
    page = page_of(tmp_path, "a", "older")
    assert [tag["class"] for tag in page.of("i")] == ["exact", "made", "noisy n3", "made", "made", "noisy n10"]
    (strip,) = (tag for tag in page.of("div") if tag.get("class") == "strip")
    assert strip["aria-label"] == "given: 0 exact; 2, multiplier 0.3; 5, multiplier 0.96" and strip["role"] == "img"
    assert "still.png: latent frame 0, multiplier 0" in page.text


def test_many_multipliers_are_a_range(tmp_path):
    given = {"0": 0, "1": 0.1, "2": 0.2, "3": 0.3, "5": 0.2}
    put(tmp_path, "a", ".mp4", levels={"given": given, "starts": [0] * 6})
    assert "given: 0 exact; 1-3, 5, multipliers 0.1 to 0.3" in page_of(tmp_path, "a").text


@pytest.mark.parametrize(
    ("before", "inputs", "shown"),
    [([1, 2], {"/a.png": "x"}, "given: 0 exact"), ([0, 1, 2], {}, ""), ([], {"/a.png": "x"}, "given: 0 exact; 1-2"),
     (None, {}, ""), (None, {"/a.png": "x"}, "given: 0 exact; 1-2"), ([[1], None, "2"], {}, "given: 0 exact; 1-2")],
)  # fmt: skip
def test_what_the_pass_before_made_was_not_given(tmp_path, before, inputs, shown):
    levels = {"given": {"0": 0, "1": 0.3, "2": 0.3}, "starts": [0] * 3}
    levels |= {} if before is None else {"from_pass_before": before}  # which earlier records lack
    put(tmp_path, "a", ".mp4", levels=levels, inputs=inputs)
    page = page_of(tmp_path, "a")
    assert shown in page.text and ("multiplier 0.3" in page.text) == ("1-2" in shown)
    assert len(page.of("i")) == (3 if shown else 0) and ("given:" in page.text) == bool(shown)


def test_settings_that_differ_from_the_familys_defaults_come_first(tmp_path):
    put(tmp_path, "a", ".mp4", model={"backbone": "wan2.1"}, job={**JOB, "num_frames": 81, "guidance": 5.0})
    put(tmp_path, "b", ".mp4", job={**JOB, "num_frames": 81, "guidance": 5.0, "steps": 9})
    text = write_gallery(tmp_path, ["a", "b"]).read_text()
    differing = [re.findall(r'class="differs"><th scope="row">(\w+)', part) for part in text.split("<article")[1:]]
    assert "num_frames" in differing[1] and "num_frames" not in differing[0]
    assert all("image" in keys and "fit" not in keys for keys in differing)
    rows = re.findall(r'<tr( class="differs")?><th scope="row">(\w+)', text.split("<article")[2])
    marks = [bool(mark) or key == "prompt" for mark, key in rows]
    assert marks == sorted(marks, reverse=True) and not all(marks)
    assert "All jobs: image still.png" in re.sub(r"\s+", " ", Page(text).text)


def test_what_most_jobs_have_is_said_once_and_a_job_says_where_it_differs(tmp_path):
    for id, steps in (("a", 8), ("b", 8), ("c", 8), ("d", 64), ("e", None)):
        put(tmp_path, id, ".mp4", job={**JOB, "steps": steps, **({"position": 1} if id != "a" else {})})
    text = write_gallery(tmp_path, [*"abcde", "not-made"]).read_text()
    assert "Most jobs: image still.png steps 8" in re.sub(r"\s+", " ", Page(text).text)
    chips = [re.findall(r"<li><b>(\w+)</b> ([^<]+)</li>", part) for part in text.split("<article")[1:]]
    own = [("position", "1")]  # not every task has a position, and not every card has it
    assert chips[:3] == [[], own, own] and chips[5] == []
    assert sorted(chips[3]) == [*own, ("steps", "64")]  # the default, which is not usual here
    assert sorted(chips[4]) == [*own, ("steps", "none")]


def test_every_element_that_the_script_asks_for_is_on_the_page():
    template = (page_files.FOLDER / "gallery.html").read_text()
    script = "".join((page_files.FOLDER / name).read_text() for name in page_files.SCRIPTS)
    asked = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert len(asked) > 20 and asked <= set(re.findall(r'id="([\w-]+)"', template))
    assert "</script" not in script and "<!--" not in script
    assert {path.name for path in page_files.FOLDER.glob("*.js")} == set(page_files.SCRIPTS)


@pytest.mark.parametrize("multipliers, seeds, across", [(2, 3, "seed"), (3, 2, "multiplier"), (2, 7, "multiplier")])
def test_sweeps_are_tables_with_their_values_as_heads(tmp_path, multipliers, seeds, across):
    values = {"multiplier": [f"0.{m + 1}" for m in range(multipliers)], "seed": [str(s) for s in range(seeds)]}
    ids = [f"x-multiplier{m}-seed{s}" for m in values["multiplier"] for s in values["seed"]]
    for id, (m, s) in zip(ids, product(*values.values()), strict=True):
        put(tmp_path, id, ".mp4", job={**JOB, "multiplier": float(m), "seed": int(s)})
    put(tmp_path, "alone", ".mp4", job={**JOB, "prompt": "another"})
    text = write_gallery(tmp_path, [*ids, "alone"]).read_text()
    table = text.split('<table class="grid">')[1].split("</tbody>")[0]
    down = ({*values} - {across}).pop()
    assert re.findall(r'scope="col">([^<]+)', table) == [f"{across} {value}" for value in values[across]]
    assert re.findall(rf'<th scope="row">({down} [^<]+)</th>', table) == [f"{down} {value}" for value in values[down]]
    places = re.findall(r'data-id="([^"]+)"', table)
    cells = [{down: row, across: column} for row in values[down] for column in values[across]]
    assert places == [f"x-multiplier{cell['multiplier']}-seed{cell['seed']}" for cell in cells]
    assert len(Page(text).of("article")) == len(ids) + 1 and 'data-id="alone"' not in table
    labels = [re.sub("<[^>]+>", "", label) for label in re.findall(r"<h3 title[^>]*>(.*)</h3>", table)]
    assert labels == [f"x, {down} {cell[down]}, {across} {cell[across]}" for cell in cells]


def test_a_thousand_jobs_are_one_page_and_more_than_a_browser_holds_are_counted(tmp_path):
    for number in range(1000):
        put(tmp_path, f"j{number}", ".mp4", job={**JOB, "prompt": "p" * 200, "seed": number})
    path = write_gallery(tmp_path, [f"j{number}" for number in range(1000)])
    assert path.stat().st_size < 4_000_000
    assert path.read_text().count("<article ") == 1000
    text = write_gallery(tmp_path, [f"m{number}" for number in range(MOST_JOBS + 7)]).read_text()
    assert text.count("<article ") == MOST_JOBS and "7 more jobs are not on this page" in text


def test_equal_failures_are_one_entry(tmp_path):
    for number in range(50):
        put(tmp_path, f"f{number}", status="failed", error="no memory")
    text = write_gallery(tmp_path, [f"f{number}" for number in range(50)]).read_text()
    box = text.split('class="failures"')[1].split("</ul>")[0]
    assert box.count("no memory") == 1 and "50 failed" in box and "and 10 more" in box


def test_the_command_is_quoted_for_a_shell(tmp_path):
    videos = tmp_path / "a 'b'; $(x)" / "videos"
    videos.mkdir(parents=True)
    (body,) = page_of(videos).of("body")
    assert body["data-command"] == f"pusa finish '{tmp_path}/a '\"'\"'b'\"'\"'; $(x)'"
    odd = tmp_path / os.fsdecode(b"caf\xe9\n") / "videos"
    odd.mkdir(parents=True)
    assert page_of(odd).of("body")[0]["data-command"] == "pusa finish RUN"


def test_the_page_is_written_now_and_then_while_jobs_are_made(tmp_path):
    times, page = [0.0], tmp_path / "gallery.html"
    live = LiveGallery(tmp_path, ["a"], now=lambda: times[0])
    step = live.after(lambda name, call: call())
    written = []
    for now in (0, 29, 31, 40, 62):
        times[0] = now
        page.unlink(missing_ok=True)
        assert step("chunk", lambda: 5) == 5
        written.append(page.exists())
    assert written == [True, False, True, False, True]


def test_a_page_that_cannot_be_written_costs_no_job(tmp_path):
    (tmp_path / "gallery.html").mkdir()
    live = LiveGallery(tmp_path, ["a"])
    assert live.after(lambda name, call: call())("chunk", lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        live.after(lambda name, call: call())("chunk", lambda: 1 / 0)


def test_a_video_that_cannot_be_read_is_left_out_of_the_sheet(tmp_path):
    for name in ("folder", "empty", "good"):
        (tmp_path / f"{name}.json").write_text('{"status": "done"}')
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "good.mp4", np.full((9, 64, 96, 3), 200, np.uint8), 8)
    assert read_image(write_sheet(tmp_path, ["folder", "empty", "good"])).shape[1] == 100
