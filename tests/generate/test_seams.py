"""Where the parts of a video meet, and how much the video changes there."""

import json

import numpy as np
import pytest

from pusa.backbones import find_family
from pusa.generate.numbers import Measures, find_joins
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest
from pusa.registry import find
from pusa.tasks import TASKS

GEOMETRY = find_family().geometry
JOINS = [
    ("text_to_video", {}, []),
    ("image_to_video", {"image": "a"}, [0]),
    ("image_to_video", {"image": "a", "position": 2}, [6, 12]),
    ("keyframes", {"frames": {0: {"image": "a"}, -1: {"image": "b"}}}, [0, 24]),
    ("extension", {"video": "a", "given": [0, 1, 2]}, [12]),
    ("extension", {"video": "a", "direction": "backwards", "given": [1, 2]}, [18]),
    ("completion", {"video": "a", "made": [2, 3]}, [6, 18]),
    ("long_video", {"num_frames": 67, "window": 31, "overlap": 2}, [30, 48]),
    ("long_video", {"num_frames": 67, "window": 31, "overlap": 2, "stagger": 2}, []),
    ("long_video", {"num_frames": 67, "window": 31, "overlap": 2, "image": "a"}, [0, 30, 48]),
    # Five latent frames that start at frame -3; the first three are the clip's. And the wrap.
    ("loop", {}, [14, 26, 29]),
    ("loop", {"image": "a"}, [2, 26, 29]),
]  # fmt: skip


def job(name, **keys):
    return find(TASKS, name, "task")(id="a", **{"width": 64, "height": 64, "num_frames": 31, "steps": 4, **keys})


def seams(video, made, chunk=None):
    """Return the seams of a video whose frames come in chunks of this length, or all at once."""
    measures = Measures(made, GEOMETRY)
    for start in range(0, len(video), chunk or len(video)):
        measures.add(video[start : start + (chunk or len(video))])
    return measures.seams()


@pytest.mark.parametrize("name, keys, expected", JOINS)
def test_joins_are_where_parts_meet(name, keys, expected):
    assert find_joins(job(name, **keys), GEOMETRY) == expected


def test_a_jump_is_measured_at_its_frame_and_even_motion_is_seamless():
    made = job("extension", video="a", given=[0, 1, 2])
    even = np.arange(31, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    assert seams(even, made) == {"12": 1.0}
    jump = even.copy()
    jump[13:] += 9
    assert seams(jump, made) == {"12": 10.0}
    still = np.zeros_like(even)
    assert seams(still, made) == {"12": 0.0}
    cycle = np.concatenate([even[:15], even[15:0:-1]])
    assert seams(cycle, job("loop"))["29"] == 1.0
    video = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    assert seams(video, job("loop")) == seams(video, job("loop"), 1) == seams(video, job("loop"), 7)


def test_the_sidecar_records_the_seams(tmp_path, drawn):
    clip = drawn / "media/ball.mp4"
    jobs = [
        {"id": "more", "task": "extension", "video": clip, "given": [0, 1, 2]},
        {"id": "loop", "task": "loop", "prompt": "a red circle"},
    ]
    size = {"width": 64, "height": 64, "num_frames": 31, "steps": 1, "guidance": 1}
    generate(
        GenerateManifest.model_validate(
            {"model": {"weights": "builtin:tiny-pusa"}, "jobs": [{**job, **size} for job in jobs]}
        ),
        tmp_path,
    )
    sidecars = {id: json.loads((tmp_path / f"videos/{id}.json").read_text()) for id in ("more", "loop")}
    assert list(sidecars["more"]["seams"]) == ["12"] and list(sidecars["loop"]["seams"]) == ["14", "26", "29"]
    assert all(value > 0 for facts in sidecars.values() for value in facts["seams"].values())
    given = ["ball.mp4 frames 0..12 of 31: latent frames 0, 1, 2, multipliers 0.1, 0.2, 0.3"]
    assert sidecars["more"]["given"] == given
