"""What determines a job's pixels: jobs that mean the same video have the same settings, and no others have."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from pusa.backbones import find_family
from pusa.errors import PusaError
from pusa.generate.canonical import _resolved, canonical
from pusa.generate.ledger import InputHashes, Ledger
from pusa.generate.outputs import with_paths_changed
from pusa.registry import find
from pusa.system.files import digest
from pusa.tasks import TASKS
from pusa.tasks.base import Job, Settings

GEOMETRY = find_family().geometry
SIZE = {"width": 64, "height": 64, "num_frames": 31, "steps": 4, "guidance": 4.5}


def job(task: str, **keys: Any) -> Job:
    return find(TASKS, task, "task")(**{"id": "x", "task": task, **SIZE, **keys})


def key(made: Job) -> str:
    return digest(with_paths_changed(canonical(made, GEOMETRY), str))[:12]


# Jobs as most are written, and the digest of all of their settings: such jobs keep the keys that they have.
PLAIN = {
    "text_to_video": ({"prompt": "a ball", "negative_prompt": "a cube", "seed": 3}, "10a98e259e99"),
    "image_to_video": ({"image": "a.png", "fit": "pad", "background": "white"}, "d389b66d7e2c"),
    "keyframes": ({"frames": {0: {"image": "a.png"}, 2: {"image": "c.png"}, -1: {"image": "b.png"}}}, "dddeba848ecc"),
    "transition": ({"start": "a.mp4", "end": "b.mp4"}, "91812030e55a"),
    "extension": ({"video": "a.mp4", "num_frames": 601}, "7d40f0cb83ab"),
    "completion": ({"video": "a.mp4", "given": [0, 1, 3], "exact": True}, "417168e08ef9"),
    "loop": ({"video": "a.mp4"}, "7e1ca53b72a3"),
    "long_video": ({"image": "a.png", "num_frames": 601, "stagger": 2}, "7a7007fea866"),
}


# The keys of these jobs and of their latents, with hashes that are made up. A video with another key is made again, so
# an upgrade must not change them without a reason, which is written at `VERSION` in canonical.py.
KEYS = {
    "text_to_video": ("2404050198b4", "a09232397077"),
    "image_to_video": ("a8c6dc73277e", "f14aa78831d2"),
    "keyframes": ("5b8185278079", "88880231191b"),
    "transition": ("8a4c5bc969c4", "0dfef2212f74"),
    "extension": ("479879a46851", "362b836e44d8"),
    "completion": ("f60453722923", "7db5be5c54a8"),
    "loop": ("c24ea4f7f670", "67e9d2fd6603"),
    "long_video": ("04458bc7195b", "5305ccf71e1a"),
}


@pytest.mark.parametrize("task", TASKS)
def test_an_upgrade_makes_no_video_again(task, monkeypatch):
    monkeypatch.setattr(InputHashes, "hash_of", lambda self, path: digest(path.name))
    ledger = Ledger(Path("videos"), GEOMETRY, {"transformer": "t", "vae": "v"}, InputHashes())
    keys = ledger.keys_of(job(task, **PLAIN[task][0], priority=3))
    assert (keys.video[:12], keys.latents[:12]) == KEYS[task]


# The last two count where they are not the default: jobs of before there were these keys keep theirs.
NOT_COUNTED = {"id", "priority", "formats", "embed", "embedded_guidance", "levels"}


@pytest.mark.parametrize("task", TASKS)
def test_plain_jobs_keep_their_settings(task):
    keys, expected = PLAIN[task]
    made = job(task, **keys)
    assert canonical(made, GEOMETRY) == made.model_dump(exclude=NOT_COUNTED)
    assert key(made) == expected


SAME = [
    ("text_to_video", {"guidance": 1}, {"guidance": 1, "negative_prompt": "a cube"}),
    ("text_to_video", {}, {"prompt": " \n", "negative_prompt": "\t", "id": "y", "priority": 7}),
    ("text_to_video", {}, {"formats": ("webm",), "embed": "none"}),
    ("text_to_video", {}, {"fit": "pad", "background": "white", "exact": True}),
    ("image_to_video", {"image": "a.png"}, {"image": "a.png", "background": "#000"}),
    ("image_to_video", {"image": "a.png", "preset": "mochi"},
     {"image": "a.png", "exact": True, "multiplier": 0.2}),
    ("image_to_video", {"image": "a.png"}, {"image": "a.png", "multiplier": -0.0}),
    ("image_to_video", {"image": "a.png", "position": 5}, {"image": "a.png", "position": -1}),
    ("image_to_video", {"image": "a.png", "position": 3}, {"image": "a.png", "position": -3}),
    ("keyframes", {"frames": {0: {"image": "a"}, 5: {"image": "b", "multiplier": 0}}, "preset": "exact"},
     {"frames": {-1: {"image": "b"}, -6: {"image": "a", "multiplier": 0}}}),
    ("keyframes", {"frames": {0: {"image": "a"}, 4: {"image": "b"}}, "preset": "mochi"},
     {"frames": {0: {"image": "a", "multiplier": 0.3}, 4: {"image": "b", "multiplier": 0.7}}}),
    ("transition", {"start": "a", "end": "b"}, {"start": "a", "end": "b", "multipliers": [0.3, 0.8, 0.8, 0.8]}),
    ("transition", {"start": "a", "end": "b", "preset": "exact"}, {"start": "a", "end": "b", "multipliers": 0}),
    ("extension", {"video": "a"}, {"video": "a", "multipliers": "0.1..0.4", "given": [0, 1, 2, 3]}),
    ("extension", {"video": "a.latents.safetensors"}, {"video": "a.latents.safetensors", "fit": "pad"}),
    ("extension", {"video": "a", "window": 61, "overlap": 5}, {"video": "a", "window": 31}),
    ("long_video", {"num_frames": 601, "window": 601}, {"num_frames": 601, "window": 1201, "overlap": 9}),
    ("long_video", {"num_frames": 61, "window": 43, "overlap": 4}, {"num_frames": 61, "window": 43, "overlap": 2}),
    ("long_video", {"window": 31, "stagger": 4}, {"window": 31, "stagger": 40, "overlap": 1}),
    ("long_video", {"num_frames": 61, "window": 25, "stagger": 4, "overlap": 2},
     {"num_frames": 61, "window": 25, "stagger": 4, "overlap": 1}),
    ("completion", {"video": "a", "given": [0, 1, 5]}, {"video": "a", "made": [2, -2, -3], "multipliers": [0, 0, 0]}),
    ("loop", {"video": "a"}, {"video": "a", "closing": 2, "window": 31, "multipliers": [0.5, 0.2, 0.5]}),
    ("loop", {"image": "a"}, {"image": "a", "window": 61, "multipliers": [0.2]}),
]  # fmt: skip


@pytest.mark.parametrize("task, one, other", SAME)
def test_two_ways_to_write_one_video_are_one(task, one, other):
    assert job(task, **one) != job(task, **other)
    assert canonical(job(task, **one), GEOMETRY) == canonical(job(task, **other), GEOMETRY)
    assert key(job(task, **one)) == key(job(task, **other))


OTHER = [
    ("image_to_video", {"image": "a.png"}, {"image": "a.png", "exact": True}),
    ("image_to_video", {"image": "a.png"}, {"image": "a.png", "fit": "pad"}),
    ("long_video", {"num_frames": 601}, {"num_frames": 601, "window": 601}),
    ("long_video", {"num_frames": 187}, {"num_frames": 187, "window": 187}),
    ("long_video", {"num_frames": 61, "window": 31}, {"num_frames": 61, "window": 31, "overlap": 2}),
    ("completion", {"video": "a", "given": [0, 1]}, {"video": "a", "given": [1, 0]}),
    ("extension", {"video": "a.latents.safetensors"}, {"video": "a.latents.safetensors", "fps": 12}),
    ("text_to_video", {}, {"embedded_guidance": 6}),
    ("text_to_video", {"embedded_guidance": 6}, {"embedded_guidance": 7}),
]


@pytest.mark.parametrize("task, one, other", OTHER)
def test_two_videos_are_two(task, one, other):
    assert key(job(task, **one)) != key(job(task, **other))


CHOICES: dict[str, dict[str, list[Any]]] = {
    "text_to_video": {},
    "image_to_video": {"image": ["a.png", "b.png"], "position": [0, 1, 5, -1, -6], "preset": ["exact", "mochi", "wan"],
                       "multiplier": [None, 0.0, 0.2]},
    "keyframes": {"preset": ["exact", "mochi"], "frames": [
        {a: {"image": "a", "multiplier": one}, b: {"image": "b", "multiplier": two}}
        for a in (0, -6) for b in (5, -1, 2) for one in (None, 0.0, 0.3) for two in (None, 0.0, 0.7)]},
    "transition": {"start": ["a"], "end": ["b"], "preset": ["exact", "mochi"], "encoding": ["each", "joint"],
                   "multipliers": [None, 0.0, [0.3, 0.8, 0.8, 0.8], [0.0, 0.0, 0.0, 0.0], "0.3..0.8"]},
    "extension": {"video": ["a", "a.safetensors"], "direction": ["forwards", "backwards"],
                  "given": [None, (0, 1, 2, 3), (1, 2, 3, 4), (0, 1)], "preset": ["exact", "mochi", "wan"],
                  "multipliers": [None, 0.0, 0.1, "0.1..0.4", [0.4, 0.3, 0.2, 0.1], "0.1..0.1"]},
    "completion": {"video": ["a"], "given": [None, (0, 1), (4, 5), (-2, -1)],
                   "made": [None, (2, 3, 4, 5), (0, 1, -3, 2)],
                   "multipliers": [0.0, 0.5, [0.5, 0.5], "0..0.5"]},
    "loop": {"image": [None, "a"], "video": [None, "a"], "closing": [None, 1, 2, 3], "window": [None, 19, 31, 37],
             "multipliers": [None, 0.2, [0.5, 0.2, 0.5], [0.2, 0.2, 0.2]]},
    "long_video": {"image": [None, "a"], "num_frames": [31, 61, 187], "window": [25, 31, 61, 163, 187, 193],
                   "overlap": [1, 2, 3, 4, 7], "stagger": [None, 1, 2, 4, 9]},
}  # fmt: skip
SHARED: dict[str, list[Any]] = {
    "prompt": ["", " ", "a"], "negative_prompt": ["", "b"], "guidance": [1, 4.5], "fit": ["crop", "pad"],
    "background": ["black", "#000000", "white"], "exact": [False, True], "priority": [0, 1],
}  # fmt: skip


def meaning(made: Job) -> Any:
    """Return what the stage makes a video from, in the order and the words of the sampler and the decoder."""
    passes = _resolved(made.passes(GEOMETRY))
    sources = [(c.source, c.multipliers) for run in passes for c in run.conditions if c.source is not None]
    pixels = any(path.suffix != ".safetensors" for path, _ in sources)
    shared = {name: getattr(made, name) for name in Settings.model_fields.keys() - {"priority", "formats", "embed"}} | {
        "prompt": made.prompt.strip() and made.prompt,
        "negative_prompt": made.guidance != 1 and (made.negative_prompt.strip() and made.negative_prompt),
        "fit": pixels and made.fit,
        "background": pixels and made.background.replace("#000000", "black"),
        "exact": any(0 in multipliers for _, multipliers in sources) and made.exact,
    }
    return made.task, repr([(run.conditions, run.timeline) for run in passes]).replace("-0.0", "0.0"), str(shared)


@pytest.mark.parametrize("task", TASKS)
def test_settings_are_equal_if_and_only_if_the_videos_are(task):
    draw, names = random.Random(task), SHARED | CHOICES[task]
    by_meaning: dict[Any, set[str]] = {}
    made_jobs = 0
    for _ in range(500):
        # Few keys differ from their defaults, so that many jobs are of one video.
        chosen = {n: draw.choice(v) for n, v in names.items() if n in CHOICES[task] or draw.random() < 0.3}
        try:
            made = job(task, **chosen)
            by_meaning.setdefault(meaning(made), set()).add(key(made))
            made_jobs += 1
        except (PusaError, ValueError):  # a combination that is refused
            continue
    assert 5 < len(by_meaning) < made_jobs
    assert [keys for keys in by_meaning.values() if len(keys) > 1] == []
    assert len(set(itertools.chain(*by_meaning.values()))) == len(by_meaning)


def test_a_job_that_cannot_be_made_keeps_its_settings():
    made = job("long_video", num_frames=61, window=19, overlap=7)
    with pytest.raises(PusaError):
        made.passes(GEOMETRY)
    assert canonical(made, GEOMETRY) == made.model_dump(exclude=NOT_COUNTED)
