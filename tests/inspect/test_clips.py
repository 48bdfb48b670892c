"""The summary and the contact sheet of a clips table."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from pusa.data.reader import Table
from pusa.errors import TableError
from pusa.inspect.inspection import inspect

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class PageParser(HTMLParser):
    """The tags of a page, its content security policy, and everything it would load."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.policy = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.loads += [value for name, value in given.items() if name in ("src", "href")]
        self.policy = given.get("content") if given.get("http-equiv") else self.policy


def page_of(folder, path, limit=100):
    inspect(folder).write(path, limit)
    return path.read_text()


def test_every_source_is_counted(run):
    numbers = inspect(run / "clips").json()
    assert numbers["sources"] == numbers["sources_with_clips"] + numbers["rejects"] == 5
    assert (numbers["clips"], numbers["rejects_by_reason"]) == (3, {"empty_file": 2})
    assert numbers["buckets"] == {"64x64x31": 3} and numbers["hours"] == pytest.approx(3 * 31 / 24 / 3600, abs=1e-6)
    assert numbers["source_sizes"] == {"128x64": 1, "64x64": 2} and numbers["source_fps"] == {"24": 2, "30": 1}
    frames = Table.open(run / "clips").read("clips")["retimed_frames"].to_pylist()
    assert numbers["retimed_frames"] == sum(frames) > 0 and numbers["retimed_sources"] == 1
    json.dumps(numbers, allow_nan=False)


def test_the_text_has_a_line_for_each_reject(run, videos):
    lines = inspect(run / "clips").text().splitlines()
    assert "  rejected, empty_file: 2" in lines
    assert any(line.strip().startswith(f"{videos}/empty\\nline.mp4") for line in lines)


def test_the_page_is_one_file_without_scripts_in_which_hostile_text_is_escaped(run, tmp_path):
    page = page_of(run / "clips", tmp_path / "page.html")
    seen = PageParser(page)
    assert seen.policy == CSP and not {"script", "b", "link", "iframe"} & set(seen.tags)
    assert len(seen.loads) == 3 * 3 and all(url.startswith("data:image/jpeg;base64,") for url in seen.loads)
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; \\x1b[31m \\u202e red" in page
    assert "&lt;b&gt;wide.mp4" in page and "empty\\nline.mp4" in page and "0..37 of 40; 30 -&gt; 24" in page


def test_a_missing_or_changed_source_has_a_message_instead_of_a_picture(run, videos, tmp_path):
    hidden = tmp_path / "hidden"
    shutil.move(videos / "0000.mp4", hidden)
    whole = (videos / "0001.mp4").read_bytes()
    (videos / "0001.mp4").write_bytes(whole[:-1])
    try:
        page = page_of(run / "clips", tmp_path / "page.html")
    finally:
        shutil.move(hidden, videos / "0000.mp4")
        (videos / "0001.mp4").write_bytes(whole)
    assert "0000.mp4 is gone" in page and "0001.mp4 is not the file that was ingested" in page
    assert page.count("<img") == 3


def test_a_limit_shows_some_rows_and_names_their_total(run, tmp_path):
    page = page_of(run / "clips", tmp_path / "page.html", limit=2)
    assert "Clips: 2 of 3, evenly spread" in page and len(re.findall("<article>", page)) == 2


def test_a_folder_that_is_not_a_table_is_refused_with_the_reason(run, tmp_path):
    with pytest.raises(TableError, match=r"inspect .*run/clips or .*run/latents"):
        inspect(run)
    with pytest.raises(TableError, match="is not a folder; expected a table"):
        inspect(tmp_path / "none")
    with pytest.raises(TableError, match="has not finished"):
        inspect(tmp_path)
    with pytest.raises(TableError, match="nothing to decode"):
        inspect(run / "clips", decode=1)


def test_an_older_table_is_refused(run, tmp_path):
    index = json.loads((run / "clips/index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"version": 1}))
    with pytest.raises(TableError, match="schema version 1"):
        inspect(tmp_path)
