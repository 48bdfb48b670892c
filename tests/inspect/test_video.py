"""`pusa inspect` of a video: everything it says about itself, safe to print, whoever wrote it."""

import json

import numpy as np
import pytest

from flows.commands import main
from pusa.inspect.video import MAX_LINES, inspect_video
from pusa.video.media import VideoWriter
from pusa.video.provenance import Provenance

FACTS = {
    "job": {"task": "image_to_video", "seed": 3, "image": {"file": "ball.png", "sha256": "ab" * 32}},
    "weights": {"vae": "0123456789abcdef"},
    "batch": None,
}


@pytest.fixture
def video(tmp_path):
    """Write a video that says something; return its path."""

    def write(provenance):
        writer = VideoWriter(tmp_path / "a.mp4", 12, (), provenance)
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
        writer.finish()
        return writer.path.rename(tmp_path / "moved and renamed")

    return write


def test_a_video_under_any_name_is_shown_with_all_it_says(video, capsys):
    path = video(Provenance("ball", "a ball", "pusa 1.2.3", FACTS))
    assert main(["inspect", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == str(path) and {
        "title ball",
        "prompt a ball",
        "made with pusa 1.2.3",
        "job.seed 3",
        f"job.image ball.png, sha256 {'ab' * 32}",
        "weights.vae 0123456789abcdef",
        "batch None",
    } <= set(lines)
    assert any(line.startswith("digital source type http") and "trainedAlgorithmicMedia" in line for line in lines)
    assert main(["inspect", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["facts"] == FACTS and shown["title"] == "ball"


def test_what_says_nothing_or_little_is_told_so(video, tmp_path, capsys):
    assert main(["inspect", str(video(Provenance("ball", maker="pusa 1")))]) == 0
    assert "not embedded, as with `embed: none`" in capsys.readouterr().out
    (tmp_path / "none.mp4").write_bytes(b"\0" * 100)
    assert main(["inspect", str(tmp_path / "none.mp4")]) == 0
    assert "nothing: it was not made by Pusa" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "none.mp4"), "--decode", "3"]) == 1
    assert "--html and --decode are for tables" in capsys.readouterr().err


def test_texts_of_strangers_are_bounded_and_cannot_steer_a_terminal(video):
    odd = "\x1b]0;title\x07\u202egpj.exe\r\n" + "x" * 1_000
    many = {f"{odd}{number}": odd for number in range(500)}
    text = inspect_video(
        video(Provenance(odd, odd, odd, {"job": many, "deep": {"a": {"b": {"c": {"d": {"e": odd}}}}}}))
    ).text()
    assert text.isascii() and all(line.isprintable() for line in text.splitlines())
    assert len(text.splitlines()) <= MAX_LINES + 2 and max(map(len, text.splitlines())) < 700
    assert "more; --json prints all" in text


def test_values_that_are_no_numbers_of_json_never_reach_a_program(video, capsys):
    """Nothing is printed that `json.loads` of another language would refuse."""
    path = video(Provenance("ball", facts={"job": {"seed": 1e308 * 10}}))
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))["facts"] is None
