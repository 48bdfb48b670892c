"""The numbers of a record: what was drawn is measured, each number is described, and given frames are compared."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pusa.backbones import find_family
from pusa.errors import MediaError, NoMemoryError
from pusa.generate import decode, given
from pusa.generate.cards import Files, card_of
from pusa.generate.decode import write_job_video
from pusa.generate.given import MOST_COMPARED, GivenFrames, compared_frames, find_given
from pusa.generate.ledger import InputHashes
from pusa.generate.numbers import NUMBERS, STRETCHES, Compared, Measures
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest
from pusa.registry import find
from pusa.system.files import own_digest
from pusa.tasks import TASKS
from pusa.video.media import write_video
from tests.helpers.drawn_videos import fading, moving
from tests.helpers.stub_model import StubModel, manifest_of

GEOMETRY = find_family().geometry


def job(name, **keys):
    return find(TASKS, name, "task")(id="a", **{"width": 64, "height": 64, "num_frames": 31, "steps": 4, **keys})


def measured(video, made, chunk=None, compared=None):
    measures = Measures(made, GEOMETRY, *([compared] if compared else []))
    for start in range(0, len(video), chunk or len(video)):
        measures.add(video[start : start + (chunk or len(video))])
    return measures


def record_of(run: Path, id: str) -> dict:
    return json.loads((run / f"videos/{id}.json").read_text())


# Of drawn frames.


def test_a_step_of_the_colour_at_a_join_is_measured_in_levels():
    video = moving(31)
    video[13:, ..., 2] += 10
    steps = measured(video, job("extension", video="a", given=[0, 1, 2])).colour_steps()
    assert steps == {"12": 10.0}
    # Frame 13 follows the given ones, and frame 12 is the last of them.
    video[13:] -= 10
    measures = measured(video, job("extension", video="a", given=[0, 1, 2]))
    assert measures.colour_steps() == {"12": 10.0}
    assert measures.numbers()["worst_colour_step"] == 10 and measures.numbers()["worst_seam"] == measures.seams()["12"]


def test_motion_and_flicker_are_in_levels_and_absent_where_there_are_too_few_frames():
    made = job("text_to_video")
    assert measured(fading(10, 13, 16, 19), made).numbers() == {"motion": 3.0, "flicker": 0.0}
    assert measured(fading(10, 14, 10, 14, 10), made).numbers() == {"motion": 4.0, "flicker": 4.0}
    assert measured(fading(10, 14), made).numbers() == {"motion": 4.0}
    assert measured(fading(10), made).numbers() == {}


def test_a_perfect_loop_closes_and_one_with_a_jump_does_not():
    loop = job("loop", num_frames=193)  # 32 latent frames of 6 frames
    turn = moving(192, 16, 384)  # 2 pixels a frame
    assert measured(turn, loop).numbers()["loop_closure"] == pytest.approx(1, abs=0.02)
    assert measured(turn[:-1], job("text_to_video")).numbers().keys() == {"motion", "flicker"}
    twice_as_far = moving(192, 16, 416)  # which ends 32 pixels before the beginning
    assert measured(twice_as_far, loop).numbers()["loop_closure"] > 2


def test_given_frames_are_compared_by_their_numbers_in_the_video():
    video = moving(31)
    off = np.clip(video.astype(int) + 5, 0, 255).astype(np.uint8)
    compared = Compared({0: video[0], 12: video[12]}, {0: off[0], 12: off[12]})
    numbers = measured(video, job("extension", video="a", given=[0, 1, 2]), compared=compared).numbers()
    assert numbers["given_psnr"] == 99 and numbers["given_ssim"] == 1
    assert numbers["given_round_trip_psnr"] == pytest.approx(10 * np.log10(255**2 / 25), abs=1e-3)
    assert 0.9 < numbers["given_round_trip_ssim"] < 1


@pytest.mark.parametrize("task", ["loop", "extension"])
def test_no_number_depends_on_the_chunks(task):
    made = job(task, **({"video": "a", "given": [0, 1, 2]} if task == "extension" else {}))
    video = np.random.default_rng(0).integers(0, 256, (30 + (task == "extension"), 16, 16, 3), np.uint8)
    compared = Compared({0: video[1], 7: video[8]}, {12: video[3]})
    whole = measured(video, made, compared=compared)
    for chunk in (1, 4, 7):
        parts = measured(video, made, chunk, compared)
        assert parts.numbers() == whole.numbers() and parts.colour_steps() == whole.colour_steps()


# Which given frames are compared.


@pytest.fixture
def inputs(tmp_path):
    """A folder with a picture and a clip of 61 frames, whose first frame is the picture."""
    clip = moving(61, 32, 32)
    Image.fromarray(clip[0]).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", clip, 24)
    return tmp_path


def stub_job(**keys):
    return manifest_of({"id": "a", **keys}).jobs[0]


def test_as_many_given_frames_are_compared_evenly_spread_with_both_ends(inputs):
    clip = stub_job(task="completion", video=inputs / "a.mp4", made=[5], num_frames=61, multipliers=0.5)
    frames = compared_frames(find_given(clip, GEOMETRY))
    assert len(frames) == MOST_COMPARED and (frames[0], frames[-1]) == (0, 60) and not set(range(25, 31)) & set(frames)
    assert min(np.diff(frames)) >= 7 and max(np.diff(frames)) <= 8 + 6
    picture = stub_job(task="image_to_video", image=inputs / "a.png")
    assert compared_frames(find_given(picture, GEOMETRY)) == [0]
    assert compared_frames(find_given(stub_job(), GEOMETRY)) == []


class Counted(StubModel):
    """Counts the latent frames that it decodes, and may fail for those of a clip that is given."""

    decoded: list[int]

    def decode_chunks(self, z_CFhw):
        self.decoded.append(z_CFhw.shape[1])
        yield from super().decode_chunks(z_CFhw)


def counted(spec):
    model = Counted(spec)
    model.decoded = decoded_by_tests
    return model


decoded_by_tests: list[int] = []


def test_jobs_with_the_same_inputs_decode_them_once_and_only_as_far_as_needed(inputs):
    decoded_by_tests.clear()
    seeds = [
        {"id": f"s{n}", "task": "extension", "video": inputs / "a.mp4", "given": [0, 1], "num_frames": 19, "seed": n}
        for n in range(3)
    ]
    generate(manifest_of(*seeds), inputs, counted)
    assert sorted(decoded_by_tests) == [2, 4, 4, 4]
    assert all("given_round_trip_psnr" in record_of(inputs, row["id"])["numbers"] for row in seeds)


def test_what_would_take_too_many_latent_frames_has_no_round_trip(inputs, monkeypatch):
    monkeypatch.setattr(given, "MOST_DECODED", 2)
    clip = {"task": "extension", "video": inputs / "a.mp4", "num_frames": 19}
    generate(manifest_of({"id": "two", "given": [0, 1], **clip}, {"id": "three", "given": [0, 1, 2], **clip}),
             inputs, StubModel)  # fmt: skip
    assert "given_round_trip_psnr" in record_of(inputs, "two")["numbers"]
    three = record_of(inputs, "three")
    assert "given_psnr" in three["numbers"] and "given_round_trip_psnr" not in three["numbers"]
    assert "warning" not in three


class WithoutRoundTrips(StubModel):
    """Runs out of memory for what is given, and for nothing else."""

    def decode_chunks(self, z_CFhw):
        if z_CFhw.shape[1] == 1:
            raise NoMemoryError("one latent frame does not fit in memory")
        yield from super().decode_chunks(z_CFhw)


def test_a_round_trip_that_fails_costs_its_number_alone(inputs):
    manifest = manifest_of({"id": "a", "task": "image_to_video", "image": inputs / "a.png"})
    assert generate(manifest, inputs, WithoutRoundTrips).made == ["a"]
    record = record_of(inputs, "a")
    assert "no round trip of a.png: one latent frame does not fit in memory" in record["warning"]
    assert "given_psnr" in record["numbers"] and "given_round_trip_psnr" not in record["numbers"]


def test_an_input_that_was_replaced_since_is_not_compared(inputs):
    reader = GivenFrames(StubModel(manifest_of({"id": "a"}).model), None, InputHashes())  # type: ignore[arg-type]
    made = stub_job(task="image_to_video", image=inputs / "a.png")
    compared = reader.read(made, {str(inputs / "a.png"): "the hash of another picture"})
    assert not compared.pixels and not compared.round_trip
    assert "a.png was changed since the job was sampled" in compared.problem
    (inputs / "a.png").unlink()
    assert "a.png cannot be read" in reader.read(made, {}).problem


def test_a_number_that_cannot_be_measured_costs_a_warning(tmp_path, monkeypatch, caplog):
    def fail(path, frames, fps):
        raise MediaError("ffmpeg died")

    monkeypatch.setattr(decode, "measure_file", fail)
    made = stub_job()
    facts = write_job_video(
        made, StubModel(manifest_of({"id": "a"}).model), torch.rand(12, 2, 4, 4), tmp_path / "a.mp4"
    )()
    assert facts["warning"] == "numbers are missing: ffmpeg died" and "job a lacks numbers" in caplog.text
    assert facts["numbers"].keys() == {"motion", "flicker"} and (tmp_path / "a.mp4").exists()


def test_a_record_of_an_earlier_version_stays_valid(tmp_path):
    manifest = manifest_of({"id": "a"})
    generate(manifest, tmp_path, StubModel)
    path = tmp_path / "videos/a.json"
    record = record_of(tmp_path, "a")
    older = {key: value for key, value in record.items() if key not in ("numbers", "colour_steps", "sha256")}
    path.write_text(json.dumps({**older, "sha256": own_digest(older)}))
    before = os.stat(tmp_path / "videos/a.mp4").st_mtime_ns
    assert generate(manifest, tmp_path, StubModel).kept == ["a"]
    assert "numbers" not in record_of(tmp_path, "a") and os.stat(tmp_path / "videos/a.mp4").st_mtime_ns == before


def test_the_gallery_shows_numbers_with_their_units_and_leaves_out_other_shapes(tmp_path):
    numbers = {"given_psnr": 31.254, "motion": "<b>", "flicker": float("nan"), "unknown": 1, "worst_seam": True}
    numbers |= {"frozen_frames": 5.0, "frozen": [[10, 14]], "black": "x" * 10**6}
    (tmp_path / "a.json").write_text(json.dumps({"status": "done", "numbers": numbers}))
    (tmp_path / "b.json").write_text(json.dumps({"status": "done", "numbers": [1]}))
    shown = dict(card_of("a", Files(tmp_path)).facts)
    assert shown == {"given psnr": "31.25 dB", "frozen frames": "5 frames", "frozen stretches": "[[10, 14]]"}
    assert card_of("b", Files(tmp_path)).facts == []


# A whole job.


def test_each_record_has_the_numbers_that_apply_and_each_is_described(tmp_path, drawn):
    clip = drawn / "media/ball.mp4"
    picture = tmp_path / "a.png"
    Image.fromarray(moving(1)[0]).save(picture)
    size = {"width": 64, "height": 64, "num_frames": 31, "steps": 1, "guidance": 1}
    always = {"motion", "flicker", "vmaf_motion", "spatial_information", "temporal_information"}
    always |= {"black_frames", "frozen_frames"}
    joined = always | {"worst_seam", "worst_colour_step"}
    pixels, round_trip = {"given_psnr", "given_ssim"}, {"given_round_trip_psnr", "given_round_trip_ssim"}
    kept = tmp_path / "videos/text.latents.safetensors"
    jobs: dict[str, tuple[dict, set[str]]] = {
        "text": ({"task": "text_to_video"}, always),
        "one": ({"task": "text_to_video", "num_frames": 1}, {"spatial_information", "black_frames"}),
        "picture": ({"task": "image_to_video", "image": picture, "preset": "exact"}, joined | pixels | round_trip),
        "exact": (
            {"task": "image_to_video", "image": picture, "preset": "exact", "exact": True, "formats": ["png"]},
            joined | pixels | round_trip,
        ),
        "clip": ({"task": "extension", "video": clip, "given": [0, 1, 2]}, joined | pixels | round_trip),
        "latents": ({"task": "extension", "video": kept, "given": [0, 1, 2]}, joined | round_trip),
        "loop": ({"task": "loop", "prompt": "a red circle"}, joined | {"loop_closure"}),
        "long": ({"task": "long_video", "num_frames": 67, "window": 31, "overlap": 2}, joined),
    }
    rows = [{"id": id, **size, **keys} for id, (keys, _) in jobs.items()]
    manifest = {"model": {"weights": "builtin:tiny-pusa"}, "jobs": rows}
    generate(GenerateManifest.model_validate(manifest), tmp_path)
    records = {id: record_of(tmp_path, id) for id in jobs}
    for id, (_, names) in jobs.items():
        assert records[id]["numbers"].keys() - set(STRETCHES) == names <= NUMBERS.keys(), id
        assert records[id]["colour_steps"].keys() == records[id]["seams"].keys()
    assert all(isinstance(value, float) for value in records["clip"]["numbers"].values())
    exact, picture_kept = records["exact"]["numbers"], records["picture"]["numbers"]
    assert exact["given_psnr"] == 99 and exact["given_ssim"] == 1
    assert picture_kept["given_round_trip_psnr"] > 60 > 45 > picture_kept["given_psnr"]
    # The picture put back differs from its round trip as its round trip does from the picture.
    assert exact["given_round_trip_psnr"] == pytest.approx(picture_kept["given_psnr"], abs=0.01)
