"""What a video says about itself: standard tags, one XMP packet, the same bytes each time, and bounded reading."""

import json
import re
import struct
import subprocess
import sys
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pusa.errors import MediaError
from pusa.system.files import sha256_file
from pusa.video.media import VideoWriter, read_frames
from pusa.video.provenance import (
    AI_MADE,
    MAX_BOXES,
    MAX_PACKET,
    MAX_WRITTEN,
    XMP_BOX,
    Provenance,
    append_packet,
    read_provenance,
)

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
SAID = Provenance("ball-1", "a ball & a <cube>\nrolls", "pusa 1", {"job": {"seed": 3}, "batch": None})


def write(path, provenance=SAID, formats=()):
    writer = VideoWriter(path, 12, formats, provenance)
    writer.write(FRAMES)
    writer.finish()
    return path


def shown_by_ffmpeg(path):
    """What ffmpeg prints of a file, as any player's library would find it."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace").stderr


def box(kind, content, size=None):
    return struct.pack(">I4s", 8 + len(content) if size is None else size, kind) + content


def packet(description):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:pusa="urn:pusa:">'
        f"{description}</x:xmpmeta>"
    ).encode()


@pytest.fixture
def hostile(tmp_path):
    """Write a file of boxes, and return what it says."""

    def read(*boxes):
        path = tmp_path / "hostile.mp4"
        path.write_bytes(b"".join(boxes))
        return read_provenance(path)

    return read


def test_a_video_says_what_was_written_and_its_frames_are_as_without(tmp_path):
    said, silent = write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4", None)
    assert read_provenance(said) == SAID and SAID.source_type == AI_MADE and read_provenance(silent) is None
    assert np.array_equal(read_frames(said, range(5)), read_frames(silent, range(5)))
    moved = said.rename(tmp_path / "renamed")
    assert read_provenance(moved) == SAID
    again = write(tmp_path / "c.mp4")
    assert sha256_file(again) == sha256_file(moved), "no time and no name of the machine is in the file"


def test_players_find_title_and_prompt_in_every_container(tmp_path):
    path = write(tmp_path / "a.mp4", formats=("webm", "lossless"))
    for name in ("a.mp4", "a.webm", "a.lossless.mkv"):
        shown = shown_by_ffmpeg(tmp_path / name)
        assert re.search(r"(?i)^ +title +: ball-1$", shown, re.M), name
        assert re.search(r"(?i)^ +comment +: a ball & a <cube>$", shown, re.M), name
    assert (
        b"\xa9nam" in path.read_bytes() and b"\xa9cmt" in path.read_bytes()
    )  # not keys of Apple's `mdta`, that few read


def test_the_packet_is_a_box_that_other_readers_know(tmp_path):
    data = write(tmp_path / "a.mp4").read_bytes()
    start = data.index(XMP_BOX) - 8
    size, kind = struct.unpack(">I4s", data[start : start + 8])
    assert kind == b"uuid" and start + size == len(data), "the last box ends where the file ends"
    assert b"<Iptc4xmpExt:DigitalSourceType>" + AI_MADE.encode() in data[start:]
    assert b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>' in data[start:]


@given(st.text(max_size=60), st.text(st.characters(), max_size=60))
def test_any_text_is_written_and_the_settings_are_read_exactly(tmp_path_factory, title, prompt):
    path = tmp_path_factory.getbasetemp() / "texts.mp4"
    path.write_bytes(b"")
    append_packet(path, replace(SAID, title=title, prompt=prompt, facts={"prompt": prompt}))
    said = read_provenance(path)
    assert said.facts == {"prompt": prompt}
    if all(character == " " or character.isalnum() for character in prompt):
        assert said.prompt == prompt.strip()


def test_control_characters_reach_no_command_line_and_no_xml(tmp_path):
    odd = "a\0b\x1b[31mc\ufffe\ud800d"
    said = read_provenance(write(tmp_path / "a.mp4", Provenance("t", odd, facts={"prompt": odd})))
    assert said.prompt == "a b [31mc  d" and said.facts == {"prompt": odd}


def test_the_longest_prompts_and_large_matrices_fit_and_more_is_left_out_by_name(tmp_path):
    prompt = "ü&" * 5_000
    levels = [[0.123456789] * 31] * 1_001
    facts = {"job": {"prompt": prompt, "negative_prompt": prompt, "levels": levels}}
    said = read_provenance(write(tmp_path / "a.mp4", Provenance("t", prompt, facts=facts)))
    assert said.facts == facts and said.prompt == prompt
    facts = {"key": "k", "job": {"levels": [[0.123456789] * 31] * 20_000}}
    written = Provenance("t", facts=facts).packet()
    assert len(written) < MAX_WRITTEN
    (tmp_path / "b.mp4").write_bytes(box(b"uuid", XMP_BOX + written))
    assert read_provenance(tmp_path / "b.mp4").facts == {"key": "k", "left_out": ["job"]}


def test_hostile_boxes_are_not_followed(hostile):
    good = box(b"uuid", XMP_BOX + SAID.packet())
    assert hostile(box(b"ftyp", b"isom"), good).title == "ball-1"
    assert hostile(struct.pack(">I4sQ", 1, b"free", 20) + b"1234", good).title == "ball-1"  # a size of 64 bits
    assert hostile(box(b"uuid", XMP_BOX + SAID.packet(), size=0)).title == "ball-1"  # up to the end of the file
    assert hostile(box(b"mdat", b"", size=1 << 30), good) is None  # a box of 1 GB in a small file
    assert hostile(struct.pack(">I4sQ", 1, b"mdat", 1 << 62), good) is None
    assert (
        hostile(struct.pack(">I4sQ", 1, b"mdat", 3), good) is None and hostile(box(b"mdat", b"", size=4), good) is None
    )
    assert hostile(box(b"free", b"") * MAX_BOXES, good) is None
    assert hostile(b"") is None and hostile(b"\0\0") is None and hostile(good[:-1]) is None
    assert hostile(good, box(b"uuid", XMP_BOX + b"\0" * MAX_PACKET)).title == "ball-1", "too large to be read"
    assert hostile(box(b"uuid", XMP_BOX, size=20)) is None


def test_hostile_packets_are_read_as_nothing(hostile):
    def said(content):
        return hostile(box(b"uuid", XMP_BOX + content))

    assert said(packet("<dc:title>x</dc:title>")).title == "x"
    laughs = b'<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>' + packet("<dc:title>&b;</dc:title>")
    for content in (
        laughs,
        packet("<a>" * 100_000),
        packet("<dc:title>\xff").replace(b"\xc3\xbf", b"\xff"),
        b"\xff\xfe<",
    ):
        assert said(content) is None
    assert said(b'<?xml version="1.0" encoding="latin-99"?>' + packet("<dc:title>ü</dc:title>")).title == "ü"
    for facts in ("[" * 100_000, '{"a":' * 40 + "1" + "}" * 40, '{"a": 1e999}', '{"a": NaN}', "[1]", "9" * 5_000, "{"):
        assert said(packet(f"<dc:title>x</dc:title><pusa:specification>{facts}</pusa:specification>")) == Provenance(
            "x", source_type=""
        ), facts[:20]


def test_the_largest_packet_takes_bounded_memory(tmp_path):
    values = ",".join(["[]"] * (MAX_WRITTEN // 3 - 10))
    bomb = packet('<dc:title>x</dc:title><pusa:specification>{"a":[' + values + "]}</pusa:specification>")
    (tmp_path / "a.mp4").write_bytes(box(b"uuid", XMP_BOX + bomb))
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom pusa.video.provenance import read_provenance\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nsaid = read_provenance(Path(sys.argv[1]))\n"
        "assert len(said.facts['a']) > 10**6\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kib < 1 << 19, "512 MiB"


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(MediaError, match="is not a regular file"):
        read_provenance(tmp_path)
    with pytest.raises(MediaError, match="cannot be read"):
        read_provenance(tmp_path / "none.mp4")


def test_facts_are_written_in_one_order():
    one, other = ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1})
    assert replace(SAID, facts=one).packet() == replace(SAID, facts=other).packet()
    assert (
        json.dumps({"a": 1, "b": {"c": 2, "d": 3}}, separators=(",", ":")).encode() in replace(SAID, facts=one).packet()
    )
