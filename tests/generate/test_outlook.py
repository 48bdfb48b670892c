"""What a run will find and need, before it starts: jobs that are made, disk space, time, legal sizes."""

import json

import pytest

from flows.commands import main
from pusa.backbones import find_family
from pusa.generate.ledger import LATER
from pusa.generate.outlook import BITS_PER_PIXEL, look_ahead
from pusa.generate.stage import generate
from pusa.system.files import own_digest
from tests.helpers.stub_model import StubModel, manifest_of

GEOMETRY = find_family().geometry


@pytest.fixture
def run(tmp_path):
    """Return the videos' folder of a run that made `a` and `b`, in 3 s each."""
    videos = generate(manifest_of({"id": "a"}, {"id": "b", "seed": 1}), tmp_path, StubModel).videos
    for path in (videos / "a.json", videos / "b.json"):
        edit(path, seconds={"sample": 2, "decode": 1}, device="a device")
    return videos


def edit(path, **changes):
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**record, "sha256": own_digest(record)}))


def ahead(folder, *jobs, slots=1, **defaults):
    return look_ahead(manifest_of(*jobs, **defaults).jobs, GEOMETRY, folder, slots)


def test_made_jobs_count_as_done_and_changed_new_or_damaged_ones_are_left(run):
    same = ({"id": "a", "priority": 3}, {"id": "b", "seed": 1})
    assert (ahead(run, *same).done, ahead(run, *same).left) == (2, 0)
    assert ahead(run, {"id": "a", "prompt": "another"}, {"id": "c"}).done == 0
    more = {**same[0], "formats": ("gif", "png")}
    assert ahead(run, more).done == 0 and ahead(run, more).video_bytes > 2 * ahead(run, {"id": "c"}).video_bytes
    (run / "a.mp4").write_bytes(b"torn")
    assert ahead(run, *same).done == 1


def test_jobs_that_an_earlier_version_made_count_as_done(run):
    for id in "ab":
        made = json.loads((run / f"{id}.json").read_text())["job"]
        edit(run / f"{id}.json", job={key: value for key, value in made.items() if key not in LATER})
    assert ahead(run, {"id": "a"}, {"id": "b", "seed": 1, "levels": "staircase(2)"}).done == 1


def test_latents_are_counted_exactly_and_videos_as_those_that_were_made(run, tmp_path):
    jobs = [{"id": "c", "prompt": "x"}, {"id": "ring", "task": "loop", "num_frames": 31}]
    found = ahead(run, *jobs)
    made = [generate(manifest_of(job), tmp_path / job["id"], StubModel).videos for job in jobs]
    files = [next(videos.glob("*.latents.safetensors")).stat().st_size for videos in made]
    header = 1000  # bytes at most, of each file
    assert sum(files) - 2 * header < found.latent_bytes < sum(files)
    sizes, pixels = [(run / f"{id}.mp4").stat().st_size for id in "ab"], 32 * 32 * 7
    assert found.measured == 2 and found.video_bytes == round(sum(sizes) / 2 / pixels * 32 * 32 * (7 + 31))
    assert ahead(tmp_path / "new", *jobs).video_bytes == 32 * 32 * (7 + 31) * BITS_PER_PIXEL / 8
    assert "1.04 MiB" not in " ".join(found.lines(GEOMETRY, run)) and found.free_bytes > found.video_bytes


def test_the_time_is_that_of_jobs_of_this_size_on_each_device_shared_by_the_slots(run):
    edit(run / "b.json", device="another", seconds={"sample": 60, "decode": 0})
    found = ahead(run, *({"id": f"j{i}", "steps": 2} for i in range(100)), slots=2)
    assert found.seconds == {"a device": 600, "another": 12_000}
    text = "\n".join(found.lines(GEOMETRY, run))
    assert "about 5 min on a device, 2 at a time" in text and "about 1 h 40 min on another" in text
    assert "width and height are multiples of 16, num_frames is 6k + 1" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": "long"},
        {"seconds": {"sample": -1, "decode": "x"}},
        {"job": []},
        {"job": {"width": "1e9"}, "device": 3},
    ],
)
def test_records_that_somebody_edited_do_not_matter(run, changes):
    for id in "ab":
        edit(run / f"{id}.json", **changes)
    found = ahead(run, {"id": "c"})
    assert not found.seconds and "time: unknown" in found.lines(GEOMETRY, run)[-1]


def test_the_command_says_it_after_the_table_of_memory(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        'kind: generate\nmodel: {weights: "builtin:tiny"}\nplace: {processes: 2}\n'
        "jobs: [{id: a, task: text_to_video, width: 64, height: 64, num_frames: 31},\n"
        "  {id: lacks, task: image_to_video, image: none.png, width: 128, height: 128, num_frames: 31}]\n"
    )
    assert main(["plan", str(tmp_path / "m.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "1 cannot be made: see `pusa check`" in out and "lacks" not in out
    assert "jobs: 0 made already, 1 to make" in out and "disk: 18 KiB of latents" in out
    assert "time: unknown" in out and not (tmp_path / "run").exists()
