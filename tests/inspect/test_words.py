from itertools import pairwise

import pytest

from pusa.inspect.summary import between, columns, counted, lasting, size, spread


def test_counts_name_the_most_frequent_and_how_many_others_there_are():
    assert counted({"a": 1, "b": 2000, "c": 3}, most=2) == "b (2,000), c (3), 1 others"
    assert counted({}) == "none"


@pytest.mark.parametrize("count, told", [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**40, "1 TiB")])
def test_sizes(count, told):
    assert size(count) == told


@pytest.mark.parametrize("hours, told", [(0.001, "3.6 seconds"), (0.5, "30.0 minutes"), (2000, "2,000.0 hours")])
def test_times(hours, told):
    assert lasting(hours) == told


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("wanted", [0, 1, 3, 8])
def test_places_are_spread_from_the_first_to_the_last(count, wanted):
    places = spread(count, wanted)
    assert len(places) == len(set(places)) == min(count, wanted) and places == sorted(places)
    if len(places) > 1:
        gaps = [b - a for a, b in pairwise(places)]
        assert places[0] == 0 and places[-1] == count - 1 and max(gaps) - min(gaps) <= 1


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns(("a", "b"), [("long", "1"), ("x", "22")]) == "a     b\nlong  1\nx     22"
    assert between(None, 1.0) == "-"
    assert between(-3e38, 1) == "-3.00e+38 .. 1.00"
