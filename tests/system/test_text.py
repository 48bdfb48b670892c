"""Untrusted text becomes safe to print, to log and to show in markdown, and lists become short."""

from datetime import datetime, timedelta, timezone

from pusa.system.text import (
    MAX_LINES,
    MAX_LISTED,
    first_line,
    join_lines,
    join_names,
    join_ranges,
    local_time,
    markdown,
    printable,
    printable_lines,
)
from tests.helpers.pages import shown


def test_characters_that_steer_a_terminal_are_escaped():
    assert printable("a\nb\x1b[2J\u202e\udcff\x00") == "a\\nb\\x1b[2J\\u202e\\udcff\\x00"
    assert printable("Grüße, 世界") == "Grüße, 世界"


def test_a_long_text_is_cut_and_its_length_is_given():
    assert printable("x" * 100_000, 10) == "x" * 10 + "... (100,000 characters)"


def test_the_first_line_that_is_not_blank_is_returned():
    assert first_line(ValueError("\n  it is torn \n at line 5")) == "it is torn"
    assert first_line(ValueError()) == "ValueError"


def test_lines_and_tabs_are_kept_where_a_text_has_several_lines():
    assert printable_lines("a\tb\n\x1b[31mc\r\u2028") == "a\tb\n\\x1b[31mc\\r\\u2028"


def test_markdown_is_shown_literally():
    text = "![x](http://a.b/c.png) <img src=x> | `a` www.a.b \x1b[2J"
    assert shown(f"- **id** failed: {markdown(text)}") == [f"id failed: {printable(text)}"]
    assert markdown("a_1.mp4") == "a\\_1\\.mp4"


def test_lists_are_cut_and_the_rest_is_counted():
    assert join_names(["a", "b"]) == "'a', 'b'"
    assert join_names(range(30_000)).endswith(f" and {30_000 - MAX_LISTED:,} more")
    assert len(join_names(["x" * 100_000] * 100)) < 10_000
    assert join_lines("m.yaml:", ["a", "b"]) == "m.yaml:\n  a\n  b"
    assert join_lines("m.yaml:", ["a"] * 1000).splitlines()[MAX_LINES + 1 :] == ["  and 950 more"]


def test_numbers_become_ranges_and_the_rest_is_counted():
    assert join_ranges([8, 3, 1, 2, 2]) == "1-3, 8" and join_ranges([]) == ""
    assert join_ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8 and 15 more"


def test_a_time_is_shown_as_this_machine_s_clock_does_and_what_is_none_as_it_is():
    moment = datetime(2026, 1, 2, 3, 4, 5).astimezone()
    far = moment.astimezone(timezone(timedelta(hours=13)))
    assert local_time(moment.isoformat(" ")) == local_time(far.isoformat()) == "2026-01-02 03:04:05"
    assert local_time("now") == "now"
    assert local_time("0001-01-01T00:00:00+14:00") == "0001-01-01T00:00:00+14:00", "it cannot be converted"
