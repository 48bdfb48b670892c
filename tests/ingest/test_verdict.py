import numpy as np
import pytest

from pusa.errors import StageError
from pusa.ingest.sources import Source
from pusa.ingest.verdicts import judge
from pusa.manifest.models import ClipSettings, Limits
from pusa.system.files import stamp_of
from pusa.video import child
from pusa.video.decoders import read_clip
from tests.helpers.decoder_stand_ins import X264, frames_of, video

LONG = "testsrc2=size=160x96:rate=24:duration=8"


def clips_of(path, **rule):
    rule = ClipSettings(num_frames=19, width=160, height=96, windows="all", **rule)
    return judge(Source(path, "a caption", "a.txt", stamp_of(path)), rule, Limits())["clips"]


@pytest.mark.parametrize("offset", [0, 7.3])
def test_every_window_can_be_read_again_by_what_its_row_says(tmp_path, offset):
    path = video(tmp_path / "a.mkv", *X264, "-g", "48", "-output_ts_offset", offset, source=LONG)
    expected, clips = frames_of(path, 160, 96), clips_of(path)
    assert len(clips) == 10 and {clip["decoder"] for clip in clips} == {"ffmpeg", "ffmpeg_seek"}
    for clip in clips:
        assert clip["start_time"] == pytest.approx(clip["frames"][0] / 24, abs=1e-3)
        found = read_clip(path, clip["frames"], clip["decoder"], 30, start_time=clip["start_time"])
        np.testing.assert_array_equal(found, expected[clip["frames"]])


def test_a_decoder_that_cannot_start_is_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "_PER_THREAD", child._PerThread())
    monkeypatch.setattr(child.sys, "executable", "/bin/false")
    with pytest.raises(StageError, match="did not start"):
        clips_of(video(tmp_path / "a.mp4"))
