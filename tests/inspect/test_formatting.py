"""Numbers and tables as text, and evenly spread indices."""

from itertools import pairwise

import pytest

from pusa.inspect.formatting import format_bytes, format_counts, format_hours, format_range, format_table
from pusa.inspect.pictures import spread_indices


def test_counts_name_the_most_frequent_and_how_many_others_there_are():
    assert format_counts({"a": 1, "b": 2000, "c": 3}, longest=2) == "b (2,000), c (3), 1 others"
    assert format_counts({}) == "none"


@pytest.mark.parametrize("count, text", [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**40, "1 TiB")])
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("hours, text", [(0.001, "3.6 seconds"), (0.5, "30.0 minutes"), (2000, "2,000.0 hours")])
def test_durations(hours, text):
    assert format_hours(hours) == text


@pytest.mark.parametrize("length", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_indices_are_spread_from_the_first_to_the_last(length, count):
    indices = spread_indices(length, count)
    assert len(indices) == len(set(indices)) == min(length, count) and indices == sorted(indices)
    if len(indices) > 1:
        gaps = [b - a for a, b in pairwise(indices)]
        assert indices[0] == 0 and indices[-1] == length - 1 and max(gaps) - min(gaps) <= 1


def test_columns_are_as_wide_as_their_widest_cell():
    assert format_table(("a", "b"), [("long", "1"), ("x", "22")]) == "a     b\nlong  1\nx     22"
    assert format_range(None, 1.0) == "-"
    assert format_range(-3e38, 1) == "-3.00e+38 .. 1.00"
