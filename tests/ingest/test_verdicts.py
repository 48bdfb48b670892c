"""A verdict says how to read each clip again, and the ledger keeps verdicts however a run ends."""

import os
import sys
import time

import numpy as np
import pytest

from pusa.errors import StageError
from pusa.ingest.sources import Source
from pusa.ingest.verdicts import CHUNK, SOURCE_COLUMNS, TRANSIENT_REASONS, Ledger, judge, key_of
from pusa.manifest.models import ClipSettings, Limits
from pusa.system.files import GONE, stamp_of
from pusa.video.child import this_threads_child
from pusa.video.decoders import read_clip
from tests.helpers.media import X264, all_frames, encoded_video

LONG = "testsrc2=size=160x96:rate=24:duration=8"
STAMP = (1, 1, 1)
KEY, OTHER_KEY, OLD_KEY = (digit * 16 for digit in "0a9")


def clips_of(path, **settings):
    clip_settings = ClipSettings(num_frames=19, width=160, height=96, windows="all", **settings)
    return judge(Source(path, "a caption", "a.txt", stamp_of(path)), clip_settings, Limits())["clips"]


@pytest.mark.parametrize("offset", [0, 7.3])
def test_every_clip_can_be_read_again_with_the_decoder_of_its_row(tmp_path, offset):
    path = encoded_video(tmp_path / "a.mkv", *X264, "-g", "48", "-output_ts_offset", offset, source=LONG)
    expected, clips = all_frames(path, 160, 96), clips_of(path)
    assert len(clips) == 10 and {clip["decoder"] for clip in clips} == {"ffmpeg", "ffmpeg_seek"}
    for clip in clips:
        assert clip["start_time"] == pytest.approx(clip["frames"][0] / 24, abs=1e-3)
        frames = read_clip(path, clip["frames"], clip["decoder"], 30, start_time=clip["start_time"])
        np.testing.assert_array_equal(frames, expected[clip["frames"]])


def test_a_decoder_that_cannot_start_is_an_error_and_not_a_verdict(tmp_path):
    path, child = encoded_video(tmp_path / "a.mp4"), this_threads_child()
    child.close()
    child.python = "/bin/false"
    try:
        with pytest.raises(StageError, match="did not start"):
            clips_of(path)
    finally:
        child.python = sys.executable


def verdict(path, stamp=STAMP, reason=None):
    nothing = dict.fromkeys(SOURCE_COLUMNS) | {"signature": None, "detail": reason, "clips": []}
    return {"path": path, "size": stamp[0], "mtime_ns": stamp[1], "ctime_ns": stamp[2], "reason": reason, **nothing}


def stored_stamps(folder, key=KEY):
    with Ledger.open(folder, key) as ledger:
        return ledger.stamps()


def test_an_added_verdict_is_stored_although_the_work_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), Ledger.open(tmp_path, KEY) as ledger:
        ledger.add(verdict("a"))
        _ = 1 / 0
    assert stored_stamps(tmp_path) == {"a": STAMP}
    assert stored_stamps(tmp_path, OTHER_KEY) == {}


def test_of_two_verdicts_on_a_path_the_later_counts(tmp_path):
    for stamp in ((9, 9, 9), (2, 2, 2)):
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict("a", stamp))
    assert stored_stamps(tmp_path) == {"a": (2, 2, 2)}


@pytest.mark.parametrize("reason", TRANSIENT_REASONS)
def test_a_transient_verdict_counts_only_in_its_own_run(tmp_path, reason):
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.add(verdict("a", reason=str(reason)))
        ledger.add(verdict("b", reason="too_short"))
        ledger.flush()
        assert set(ledger.stamps()) == {"a", "b"}
    assert stored_stamps(tmp_path) == {"b": STAMP}


def test_verdicts_are_written_when_they_are_many_or_old(tmp_path):
    def files():
        return len(list(tmp_path.glob(f"{KEY}-*")))

    with Ledger.open(tmp_path, KEY, seconds=1e9) as ledger:
        for number in range(CHUNK - 1):
            ledger.add(verdict(str(number)))
            ledger.flush_if_due()
        assert files() == 0
        ledger.add(verdict("last"))
        ledger.flush_if_due()
        assert files() == 1
    with Ledger.open(tmp_path, KEY, seconds=0) as ledger:
        ledger.add(verdict("more"))
        ledger.flush_if_due()
        assert files() == 2


def test_a_compacted_ledger_is_one_file_without_outdated_verdicts(tmp_path):
    for path in "abc":
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict(path))
    with Ledger.open(tmp_path, OTHER_KEY) as ledger:
        ledger.add(verdict("a"))
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.compact({"a": STAMP, "b": (5, 5, 5)})
    assert stored_stamps(tmp_path) == {"a": STAMP, "c": STAMP}
    assert stored_stamps(tmp_path, OTHER_KEY) == {"a": STAMP}
    assert len(list(tmp_path.glob(f"{KEY}-*"))) == 1


def test_verdicts_on_unlisted_and_missing_files_are_kept(tmp_path):
    for path in "abc":
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict(path))
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.add(verdict("c", reason="unreadable"))
        ledger.flush()
        ledger.compact({"a": STAMP, "c": GONE})
    assert stored_stamps(tmp_path) == {path: STAMP for path in "abc"}
    before = list(tmp_path.glob(f"{KEY}-*"))
    with Ledger.open(tmp_path, KEY) as ledger:
        ledger.compact({"a": STAMP})
    assert list(tmp_path.glob(f"{KEY}-*")) == before, "nothing is written where nothing changed"


def test_the_ledger_of_other_clip_settings_is_kept_for_thirty_days(tmp_path):
    for key in (KEY, OTHER_KEY, OLD_KEY):
        with Ledger.open(tmp_path, key) as ledger:
            ledger.add(verdict("a"))
    day = 24 * 3600
    for key, days in ((OLD_KEY, 31), (OTHER_KEY, 29), (KEY, 31)):
        for path in tmp_path.glob(f"{key}-*"):
            os.utime(path, (time.time() - days * day,) * 2)
    notes = tmp_path / "notes-00000001.parquet"
    notes.write_text("not ours")
    os.utime(notes, (0, 0))
    assert stored_stamps(tmp_path) == {"a": STAMP}
    assert {path.name.split("-")[0] for path in tmp_path.glob("*.parquet")} == {KEY, OTHER_KEY, "notes"}
    assert time.time() - next(tmp_path.glob(f"{KEY}-*")).stat().st_mtime < day, (
        "the file's time is that of its last use"
    )


def test_only_a_damaged_file_is_forgotten(tmp_path):
    for path in "ab":
        with Ledger.open(tmp_path, KEY) as ledger:
            ledger.add(verdict(path))
    first = min(tmp_path.glob(f"{KEY}-*"))
    first.write_bytes(first.read_bytes()[:-9])
    assert stored_stamps(tmp_path) == {"b": STAMP}


def test_only_one_process_can_open_a_ledger(tmp_path):
    with Ledger.open(tmp_path, KEY), pytest.raises(StageError, match="another process"), Ledger.open(tmp_path, KEY):
        pass


def test_verdicts_depend_on_clip_settings_and_limits_but_not_on_the_time_limit():
    settings, limits = ClipSettings(), Limits()
    assert key_of(settings, limits) == key_of(settings, Limits(decoding_seconds=1, caption_characters=5))
    keys = {
        key_of(settings, limits),
        key_of(ClipSettings(num_frames=31), limits),
        key_of(settings, Limits(source_seconds=5)),
    }
    assert len(keys) == 3
