from pusa.system.text import first_line, printable


def test_what_steers_a_terminal_is_spelled_out():
    assert printable("a\nb\x1b[2J\u202e\udcff\x00") == "a\\nb\\x1b[2J\\u202e\\udcff\\x00"
    assert printable("Grüße, 世界") == "Grüße, 世界"


def test_a_long_text_is_cut_and_says_how_long_it_was():
    assert printable("x" * 100_000, 10) == "x" * 10 + "... (100,000 characters)"


def test_the_first_line_that_says_anything():
    assert first_line(ValueError("\n  it is torn \n at line 5")) == "it is torn"
    assert first_line(ValueError()) == "ValueError"
