"""Untrusted text becomes safe to print."""

from pusa.system.text import first_line, printable


def test_characters_that_steer_a_terminal_are_escaped():
    assert printable("a\nb\x1b[2J\u202e\udcff\x00") == "a\\nb\\x1b[2J\\u202e\\udcff\\x00"
    assert printable("Grüße, 世界") == "Grüße, 世界"


def test_a_long_text_is_cut_and_its_length_is_given():
    assert printable("x" * 100_000, 10) == "x" * 10 + "... (100,000 characters)"


def test_the_first_line_that_is_not_blank_is_returned():
    assert first_line(ValueError("\n  it is torn \n at line 5")) == "it is torn"
    assert first_line(ValueError()) == "ValueError"
