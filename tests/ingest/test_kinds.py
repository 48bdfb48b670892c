"""Ingest tells which kinds of sources it met, and what was done to them."""

import json

import pytest

from flows.console import print_result
from pusa.data.reader import Table
from pusa.ingest.kinds import KINDS
from pusa.ingest.stage import ingest
from pusa.inspect.inspection import inspect
from pusa.manifest.models import IngestManifest
from tests.helpers.media import X264, encoded_video, ffmpeg, truncate, variable

DISC = "geq=lum='if(lt(hypot(X-14-36*N/{frames},Y-32),9),235,60)':cb=128:cr=128"
SOURCE = f"color=gray:size=64x64:rate=24:duration=1,{DISC.format(frames=24)}"
BALL = f"color=gray:size=64x64:rate=48:duration=1,{DISC.format(frames=48)}"
CLIPS = {"num_frames": 7, "width": 64, "height": 64}


def make_sources(folder):
    folder.mkdir()
    plain = encoded_video(folder / "untagged_sd.mp4", *X264, source=SOURCE)
    tagged = f"{SOURCE},setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709,format=yuv420p"
    encoded_video(folder / "none.mp4", *X264, source=f"{tagged},hue=h=90")
    encoded_video(folder / "untagged_hd.mp4", *X264, source=f"{SOURCE},scale=1280:72,setsar=1")
    for name, transfer in (("hdr", "smpte2084"), ("wide_gamut", "bt2020-10")):
        tags = f"setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer},format=yuv420p"
        encoded_video(folder / f"{name}.mp4", *X264, source=f"{SOURCE},{tags}")
    depth = ("-c:v", "libx264", "-pix_fmt", "yuv420p10le")
    encoded_video(folder / "high_bit_depth.mp4", *depth, source=tagged.replace("yuv420p", "yuv420p10le"))
    fields = ("-flags", "+ildct+ilme", "-x264opts", "tff=1")
    woven = f"{BALL},setparams=colorspace=bt709,interlace=scan=tff:lowpass=off,format=yuv420p"
    encoded_video(folder / "interlaced.mp4", *X264, *fields, source=woven)
    encoded_video(folder / "alpha.mov", "-c:v", "qtrle", "-pix_fmt", "argb", source=f"{SOURCE},format=argb")
    variable(folder / "variable_rate.mp4", [(0.5, 24), (0.5, 12)])
    ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", folder / "rotated.mp4")
    encoded_video(folder / "wide_pixels.mp4", *X264, source=f"{tagged},setsar=2")
    encoded_video(folder / "odd_size.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p", source=f"{SOURCE},scale=65:65")
    ffmpeg("-i", plain, "-i", folder / "none.mp4", "-map", 0, "-map", 1, "-c", "copy", folder / "several_videos.mkv")
    whole = encoded_video(folder / "whole.mkv", *X264, "-g", "6", source=SOURCE)
    truncate(whole, 0.7).rename(folder / "damaged.mkv")
    whole.unlink()
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("a caption")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    make_sources(folder / "videos")
    return ingest(IngestManifest(source=str(folder / "videos"), clips=CLIPS), folder / "run")


def test_each_kind_is_found_where_it_is(made):
    assert made.rejects == 0
    rows = Table.open(made.table).read("clips").to_pylist()
    kinds = {row["clip_id"].partition(".")[0]: set(row["kinds"]) for row in rows}
    assert kinds.pop("none") == set()
    for name, found in kinds.items():
        assert name in found and found <= {name, "untagged_sd"}, (name, found)
    assert set(kinds) == set(KINDS) - {"film_in_fields", "fields_of_one_time"}


def test_the_result_says_what_was_done_in_one_table(made, capsys):
    print_result(made)
    lines = capsys.readouterr().out.splitlines()
    assert (
        "    hdr: 1 source: tone-mapped to SDR" in lines and "    interlaced: 1 source: deinterlaced (bwdif)" in lines
    )
    facts = Table.open(made.table).facts
    assert facts["kinds"]["damaged"] == 1 and list(facts["kinds"]) == [kind for kind in KINDS if kind in facts["kinds"]]
    ((source, loss),) = facts["losses"]
    assert source.endswith("damaged.mkv") and loss


def test_inspect_shows_the_kinds_the_colours_and_the_losses(made, tmp_path):
    table = inspect(made.table)
    numbers = table.json()
    assert numbers["kinds"] == Table.open(made.table).facts["kinds"]
    assert numbers["source_colours"]["bt2020nc bt2020 smpte2084 limited"] == 1
    assert numbers["source_field_orders"]["top_first"] == 1
    json.dumps(numbers, allow_nan=False)
    table.write(tmp_path / "page.html", 100)
    page = (tmp_path / "page.html").read_text()
    assert "transfer smpte2084" in page and "tone map mobius203" in page and "deinterlace bwdif" in page
    assert "Damaged, and used in part: 1<" in page


@pytest.mark.parametrize(
    ("setting", "name"), [("hdr", "hdr.mp4"), ("interlaced", "interlaced.mp4"), ("damaged", "damaged.mkv")]
)
def test_a_kind_can_be_rejected_by_name(made, tmp_path, setting, name):
    videos = made.table.parent.parent / "videos"
    for path in (videos / name, videos / "none.mp4"):
        (tmp_path / path.name).symlink_to(path)
        (tmp_path / path.with_suffix(".txt").name).write_text("a caption")
    manifest = IngestManifest(source=str(tmp_path), clips={**CLIPS, setting: "reject"})
    result = ingest(manifest, tmp_path.with_name("run"))
    (reject,) = Table.open(result.table).read("rejects").to_pylist()
    assert reject["reason"] == setting and name in reject["detail"] and result.clips == 1
