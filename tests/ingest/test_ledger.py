import os
import time

import pytest

from pusa.errors import StageError
from pusa.ingest.verdicts import CHUNK, SOURCE_COLUMNS, TRANSIENT_REASONS, Ledger, key_of
from pusa.manifest.models import ClipSettings, Limits
from pusa.system.files import GONE

KEY, OTHER, OLD = (digit * 16 for digit in "0a9")


def verdict(path, stamp=(1, 1), reason=None):
    nothing = dict.fromkeys(SOURCE_COLUMNS) | {"signature": None, "detail": reason, "clips": []}
    return {"path": path, "size": stamp[0], "mtime_ns": stamp[1], "reason": reason, **nothing}


def remembered(folder, key=KEY):
    with Ledger.open(folder, key) as ledger:
        return ledger.stamps()


def test_what_is_added_is_remembered_whatever_ends_the_work(tmp_path):
    with pytest.raises(ZeroDivisionError), Ledger.open(tmp_path, KEY) as ledger:
        ledger.add(verdict("a"))
        _ = 1 / 0
    assert remembered(tmp_path) == {"a": (1, 1)}
    assert remembered(tmp_path, OTHER) == {}


def test_of_two_verdicts_on_a_path_the_later_counts(tmp_path):
    for stamp in ((9, 9), (2, 2)):
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict("a", stamp))
    assert remembered(tmp_path) == {"a": (2, 2)}


@pytest.mark.parametrize("reason", TRANSIENT_REASONS)
def test_what_may_pass_counts_in_its_own_run_alone(tmp_path, reason):
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.add(verdict("a", reason=str(reason)))
        ledger.add(verdict("b", reason="too_short"))
        ledger.flush()
        assert set(ledger.stamps()) == {"a", "b"}
    assert remembered(tmp_path) == {"b": (1, 1)}


def test_a_chunk_is_written_when_it_is_full_or_old(tmp_path, monkeypatch):
    files = lambda: len(list(tmp_path.glob(f"{KEY}-*")))  # noqa: E731
    with Ledger.open(tmp_path, KEY) as ledger:
        for number in range(CHUNK - 1):
            ledger.add(verdict(str(number)))
            ledger.flush_if_due()
        assert files() == 0
        ledger.add(verdict("last"))
        ledger.flush_if_due()
        assert files() == 1
        ledger.add(verdict("more"))
        monkeypatch.setattr(module, "SECONDS", 0.0)
        ledger.flush_if_due()
        assert files() == 2


def test_compacted_it_is_one_file_without_what_is_superseded(tmp_path):
    for path in "abc":
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict(path))
    with Ledger.open(tmp_path, OTHER) as ledger:
        ledger.add(verdict("a"))
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.compact({"a": (1, 1), "b": (5, 5)})
    assert remembered(tmp_path) == {"a": (1, 1), "c": (1, 1)}
    assert remembered(tmp_path, OTHER) == {"a": (1, 1)}
    assert len(list(tmp_path.glob(f"{KEY}-*"))) == 1


def test_what_is_not_listed_or_not_there_now_may_be_again(tmp_path):
    for path in "abc":
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict(path))
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.add(verdict("c", reason="unreadable"))
        ledger.flush()
        ledger.compact({"a": (1, 1), "c": GONE})
    assert remembered(tmp_path) == {path: (1, 1) for path in "abc"}
    before = list(tmp_path.glob(f"{KEY}-*"))
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.compact({"a": (1, 1)})
    assert list(tmp_path.glob(f"{KEY}-*")) == before, "nothing is written where nothing changed"


def test_another_rules_ledger_is_kept_for_thirty_days(tmp_path):
    for key in (KEY, OTHER, OLD):
        with Ledger.open(tmp_path, key) as ledger:
            ledger.add(verdict("a"))
    day = 24 * 3600
    for key, days in ((OLD, 31), (OTHER, 29), (KEY, 31)):
        for path in tmp_path.glob(f"{key}-*"):
            os.utime(path, (time.time() - days * day,) * 2)
    notes = tmp_path / "notes-00000001.parquet"
    notes.write_text("not ours")
    os.utime(notes, (0, 0))
    assert remembered(tmp_path) == {"a": (1, 1)}
    assert {path.name.split("-")[0] for path in tmp_path.glob("*.parquet")} == {KEY, OTHER, "notes"}
    assert time.time() - next(tmp_path.glob(f"{KEY}-*")).stat().st_mtime < day, "its time is that of its last use"


def test_a_damaged_file_is_forgotten_alone(tmp_path):
    for path in "ab":
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict(path))
    first = min(tmp_path.glob(f"{KEY}-*"))
    first.write_bytes(first.read_bytes()[:-9])
    assert remembered(tmp_path) == {"b": (1, 1)}


def test_it_is_for_one_process_at_a_time(tmp_path):
    with Ledger.open(tmp_path, KEY), pytest.raises(StageError, match="another process"), Ledger.open(tmp_path, KEY):
        pass


def test_verdicts_are_a_rules_own_and_patience_is_no_part_of_it():
    rule, limits = ClipSettings(), Limits()
    assert key_of(rule, limits) == key_of(rule, Limits(decoding_seconds=1, caption_characters=5))
    keys = {key_of(rule, limits), key_of(ClipSettings(num_frames=31), limits), key_of(rule, Limits(source_seconds=5))}
    assert len(keys) == 3
