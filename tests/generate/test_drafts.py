"""Drafts and `finish`: the same bytes as without drafts, whatever is chosen, killed, changed or done at once."""

import errno
import json
import os
import re
import signal
from datetime import datetime
from itertools import count
from pathlib import Path

import pytest
import torch

from flows.commands import main
from pusa.backbones import find_family
from pusa.errors import ManifestError, MediaError
from pusa.generate import run as runs
from pusa.generate.canonical import canonical
from pusa.generate.chunks import next_time
from pusa.generate.drafts import Draft
from pusa.generate.finish import Chosen
from pusa.generate.ledger import DRAFTS, InputHashes, Ledger
from pusa.generate.listed import list_jobs, listed_jobs, manifest_of_run
from pusa.generate.outlook import describe_drafts
from pusa.generate.stage import generate
from pusa.generate.status import StatusReader
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import Drafts, GenerateManifest, ModelSpec
from pusa.system.files import own_digest, sha256_file
from pusa.video.media import probe
from tests.generate.test_ledger import contents, in_child
from tests.helpers.stub_model import TINY, StubModel, manifest_of

STEPS = 5
SMALL = {"width": 64, "height": 64, "num_frames": 13, "steps": STEPS, "guidance": 2}
JOBS = (
    {"id": "a", "prompt": "a red ball"},
    {"id": "b", "prompt": "a blue box", "seed": 1},
    {"id": "c", "prompt": "a green cup", "seed": 2},
    {"id": "alone", "prompt": "a ball", "num_frames": 7},
    {"id": "ring", "task": "loop", "num_frames": 19},
    {"id": "segments", "task": "long_video", "num_frames": 43, "window": 31, "overlap": 2},
    {"id": "stairs", "task": "long_video", "num_frames": 25, "window": 31, "overlap": 2, "stagger": 2},
    {"id": "back", "task": "extension", "num_frames": 43, "window": 31, "direction": "backwards", "given": [0, 1],
     "video": 0},
    {"id": "few", "prompt": "a ball", "steps": 2},
    {"id": "more", "task": "extension", "given": [0], "video": "RUN/videos/alone.mp4"},
)  # fmt: skip


def real(*jobs, drafts: int | None = None, folder: Path, **keys) -> GenerateManifest:
    made = [{"task": "text_to_video", **SMALL, **job} for job in jobs]
    for job in made:
        if "video" in job:
            job["video"] = Path(job["video"] or folder / "clip.mp4")
    data = {"model": ModelSpec(weights="builtin:tiny-pusa"), "jobs": made, **keys}
    return GenerateManifest.model_validate({**data, "drafts": drafts and {"steps": drafts}})


def record(run: Path, id: str) -> dict:
    return json.loads((run / f"videos/{DRAFTS}/{id}.json").read_text())


@pytest.fixture(scope="module")
def clip(tmp_path_factory, drawn) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "clip.mp4").write_bytes((drawn / "media/ball.mp4").read_bytes())
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, clip) -> dict[str, bytes]:
    """Return the videos and latents of the real tiny model, of a run without drafts."""
    run = tmp_path_factory.mktemp("whole")
    result = generate(real(*JOBS, folder=clip), run)
    assert not result.failed
    return contents(run)


def test_drafts_are_shown_and_the_chosen_are_finished_with_the_same_bytes(tmp_path, whole, clip):
    manifest, run, videos = real(*JOBS, drafts=3, folder=clip), tmp_path, tmp_path / "videos"
    first = generate(manifest, run)
    ids = [job["id"] for job in JOBS]
    assert (first.made, first.waiting, first.failed) == (["few"], ["more"], {})
    assert first.drafted == [id for id in ids if id not in ("few", "more")]
    for id in first.drafted:
        about = record(run, id)
        assert about["status"] == "draft" and about["steps"] == 3 < about["total_steps"]
        assert about["video_sha256"] == sha256_file(videos / DRAFTS / f"{id}.mp4")
        assert not (videos / f"{id}.mp4").exists() and (videos / f"previews/{id}.jpg").is_file()
    frames = {id: probe(videos / DRAFTS / f"{id}.mp4").num_frames for id in first.drafted}
    assert frames == {"a": 13, "b": 13, "c": 13, "alone": 7, "ring": 13, "segments": 31, "stairs": 7, "back": 25}
    assert record(run, "segments")["shows"] == {"latent_frames": [0, 5], "of": 8}

    stamps = {path: path.stat().st_mtime_ns for path in (videos / DRAFTS).iterdir()}
    again = generate(manifest, run)
    assert (again.made, again.kept, again.drafted) == ([], ["few"], first.drafted)
    assert stamps == {path: path.stat().st_mtime_ns for path in (videos / DRAFTS).iterdir()}

    chosen = generate(manifest, run, chosen={"b", "more"})
    assert set(chosen.made) == {"b", "alone", "more"} and chosen.kept == ["few"]
    assert not list((videos / DRAFTS).glob("b.*")) and (videos / DRAFTS / "a.mp4").exists()
    assert (videos / ".work/a.state.safetensors").exists(), "a and c are continued from it"
    assert generate(manifest, run, chosen={"b"}).made == []
    rest = generate(manifest, run, chosen=set(ids))
    assert set(rest.made) == {"a", "c", "ring", "segments", "stairs", "back"} and not rest.drafted
    assert contents(run) == whole
    assert not list((videos / DRAFTS).iterdir()) and not list((videos / ".work").glob("*.safetensors"))


STUBS = (
    {"id": "a", "prompt": "a ball", "num_frames": 13},
    {"id": "b", "prompt": "a box", "num_frames": 13, "seed": 1},
    {"id": "more", "task": "extension", "given": [0, 1], "num_frames": 19, "video": Path("RUN/videos/a.mp4")},
    {"id": "few", "prompt": "a cup", "steps": 2},
)  # fmt: skip


def stubs(*jobs, drafts: int | None = None, **keys) -> GenerateManifest:
    manifest = manifest_of(*(jobs or STUBS), steps=4).model_copy(update=keys)
    return manifest.model_copy(update={"drafts": Drafts(steps=drafts) if drafts else None})


def killed(write: int, before: bool, run: Path, chosen: bool) -> None:
    """Make drafts, or finish all, and kill this process before or after its n-th file gets its name."""
    torch.set_num_threads(1)
    rename, numbers = Path.replace, count(1)

    def replace(path, target):
        number = next(numbers)
        if before and number == write:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(path, target)
        if number == write:
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.replace = replace
    ids = {job["id"] for job in STUBS} if chosen else None
    generate(stubs(drafts=2, save_every=1e-9), run, StubModel, chosen=ids)


def drafts_of(run: Path) -> dict[str, int]:
    """Return the time of each draft that its record describes."""
    found = {}
    for path in (run / "videos" / DRAFTS).glob("*.json"):
        video = path.with_suffix(".mp4")
        if video.exists() and json.loads(path.read_text())["video_sha256"] == sha256_file(video):
            found[path.stem] = video.stat().st_mtime_ns
    return found


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_loses_no_draft_and_ends_with_the_same_files(tmp_path, before):
    plain = tmp_path / "plain"
    generate(stubs(), plain, StubModel)
    run, kills, kept = tmp_path / "run", 0, {}
    for chosen in (False, True):
        while (code := in_child(killed, kills + 1, before, run, chosen)) == -signal.SIGKILL:
            kills += 1
            now = drafts_of(run)
            assert chosen or kept.items() <= now.items(), "a draft was made again"
            kept = now
            assert kills < 200
        assert code == 0 and kills >= 4
        if not chosen:
            assert drafts_of(run).keys() == {"a", "b"}
            kills = 0
    assert contents(run) == contents(plain) and not drafts_of(run)


def test_a_job_that_is_changed_gets_another_draft_and_one_without_its_video_is_made_again(tmp_path):
    jobs = [{"id": "a"}, {"id": "b", "num_frames": 13}]
    generate(stubs(*jobs, drafts=2), tmp_path, StubModel)
    before = drafts_of(tmp_path)
    changed = [{"id": "a", "seed": 7}, jobs[1]]
    assert generate(stubs(*changed, drafts=2), tmp_path, StubModel).drafted == ["a", "b"]
    now = drafts_of(tmp_path)
    assert now["b"] == before["b"] and now["a"] != before["a"] and record(tmp_path, "a")["job"]["seed"] == 7
    (tmp_path / f"videos/{DRAFTS}/b.mp4").write_bytes(b"other")
    assert generate(stubs(*changed, drafts=2), tmp_path, StubModel).drafted == ["a", "b"]
    assert drafts_of(tmp_path).keys() == {"a", "b"} and record(tmp_path, "b")["steps"] == 2
    assert generate(stubs(*changed, drafts=3), tmp_path, StubModel).drafted == ["a", "b"]
    assert record(tmp_path, "a")["steps"] == record(tmp_path, "b")["steps"] == 3
    assert generate(stubs(*changed, drafts=1), tmp_path, StubModel).drafted == ["a", "b"]
    assert record(tmp_path, "a")["steps"] == 3, "one of more steps is as good"


def test_without_drafts_in_the_manifest_the_states_are_continued(tmp_path):
    class Counts(StubModel):
        steps = 0

        def denoiser(self, expert):
            Counts.steps += 1

    assert generate(stubs({"id": "a"}, drafts=3), tmp_path, Counts).drafted == ["a"] and Counts.steps == 3
    assert generate(stubs({"id": "a"}), tmp_path, Counts).made == ["a"] and Counts.steps == 4
    assert not (tmp_path / f"videos/{DRAFTS}/a.mp4").exists()
    other = [{"id": "b"}, {"id": "c", "seed": 1}]
    generate(stubs(*other, drafts=3), tmp_path, Counts)
    Counts.steps = 0
    assert generate(stubs(*other, drafts=3), tmp_path, Counts, chosen={"b"}).made == ["b"] and Counts.steps == 1
    assert generate(stubs(*other, drafts=3), tmp_path, Counts, chosen={"c"}).made == ["c"] and Counts.steps == 1
    assert not list((tmp_path / "videos/.work").glob("*.safetensors"))


def test_a_failure_shows_in_place_of_a_draft_and_a_draft_in_place_of_an_older_failure(tmp_path):
    class Refuses(StubModel):
        def encode_text(self, prompts, padded=True):
            raise ValueError("refused")

    jobs = stubs({"id": "a", "prompt": "a"}, drafts=2)
    assert generate(jobs, tmp_path, Refuses).failed.keys() == {"a"}
    assert StatusReader(tmp_path / "videos").read().jobs == {"a": "failed"}
    result = generate(jobs, tmp_path, StubModel)
    assert (result.drafted, result.failed) == (["a"], {})
    status = StatusReader(tmp_path / "videos").read()
    assert status.jobs == {"a": "drafted"} and status.ended and "1 drafted" in status.summary()
    assert status.counts["drafted"] == 1 and status.seconds_left == 0
    again = generate(stubs({"id": "a", "prompt": "a"}), tmp_path, StubModel)
    assert again.made == ["a"] and StatusReader(tmp_path / "videos").read().jobs == {"a": "done"}


def test_what_is_not_chosen_is_no_failure_of_finish(tmp_path):
    jobs = [{"id": "a"}, {"id": "bad", "width": 33}, {"id": "more", "task": "extension", "video": "job:bad"}]
    assert generate(stubs(*jobs, drafts=2), tmp_path, StubModel).failed.keys() == {"bad", "more"}
    records = {id: (tmp_path / f"videos/{id}.json").read_bytes() for id in ("bad", "more")}
    result = generate(stubs(*jobs, drafts=2), tmp_path, StubModel, chosen={"a"})
    assert (result.made, result.failed, result.failed_earlier) == (["a"], {}, ["bad", "more"])
    assert records == {id: (tmp_path / f"videos/{id}.json").read_bytes() for id in ("bad", "more")}
    assert generate(stubs(*jobs, drafts=2), tmp_path, StubModel, chosen={"more"}).failed.keys() == {"bad", "more"}


def states_of(run: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in (run / "videos/.work").glob("*.state.safetensors"))


def test_a_state_stays_while_a_job_of_its_batch_can_be_continued(tmp_path):
    jobs = [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}]
    generate(stubs(*jobs, drafts=2), tmp_path, StubModel)
    jobs[0] = {"id": "a", "width": 64}  # its id names the state
    generate(stubs(*jobs, drafts=2), tmp_path, StubModel, chosen={"b"})
    assert states_of(tmp_path) == ["a", "b"], "c was continued in a batch without a, and can be"
    generate(stubs(*jobs, drafts=2), tmp_path, StubModel, chosen={"c"})
    assert states_of(tmp_path) == []
    generate(stubs(*jobs, drafts=2), tmp_path, StubModel)
    assert states_of(tmp_path) == ["a"]
    generate(stubs(*jobs[1:], drafts=2), tmp_path, StubModel)
    assert states_of(tmp_path) == ["a"], "it may be of another manifest"


def test_the_state_of_drafts_that_fail_is_removed_but_not_one_that_was_saved_since(tmp_path):
    class Fails(StubModel):
        def decode_chunks(self, z_CFhw):
            raise ValueError("refused")

    assert generate(stubs({"id": "a"}, drafts=2), tmp_path, Fails).failed.keys() == {"a"}
    assert states_of(tmp_path) == []
    generate(stubs({"id": "a"}, {"id": "b", "num_frames": 13}, drafts=2), tmp_path, StubModel)
    record, state = tmp_path / "videos/a.json", tmp_path / "videos/.work/a.state.safetensors"
    for seconds, left in ((-60, ["a", "b"]), (60, ["b"])):  # when it failed, from when the state was saved
        record.write_text(json.dumps({"id": "a", "status": "failed", "error": "refused"}))
        at = state.stat().st_mtime + seconds
        os.utime(record, (at, at))
        manifest = stubs({"id": "a"}, {"id": "b", "num_frames": 13}, drafts=2)
        generate(manifest, tmp_path, StubModel, chosen=set())
        assert states_of(tmp_path) == left


def test_two_commands_at_once_make_each_job_once(tmp_path):
    jobs = [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2, "num_frames": 13}]
    manifest, inner = stubs(*jobs, drafts=2), []

    def step(name, call):
        if not inner:
            inner.append(generate(manifest, tmp_path, StubModel))
        return call()

    outer = generate(manifest, tmp_path, StubModel, step=step)
    assert inner[0].drafted == outer.drafted == ["a", "b", "c"]
    inner.clear()

    def finish_b(name, call):
        if not inner:
            inner.append(generate(manifest, tmp_path, StubModel, chosen={"b"}))
        return call()

    result = generate(manifest, tmp_path, StubModel, step=finish_b, chosen={"a"})
    assert (result.made, inner[0].made) == (["a"], ["b"])
    generate(stubs(*jobs), tmp_path / "plain", StubModel)
    generate(manifest, tmp_path, StubModel, chosen={"c"})
    mine = {name: content for name, content in contents(tmp_path).items() if name.endswith(".mp4")}
    assert mine.items() <= contents(tmp_path / "plain").items() and len(mine) == 3


def test_no_work_is_started_after_a_time_and_the_same_command_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CHUNK_SECONDS", 0.0)
    jobs = [{"id": id, "num_frames": 7 + 6 * i} for i, id in enumerate("abcd")]
    jobs[3]["priority"] = 1
    noon = datetime(2030, 6, 1, 12).timestamp()
    now = [noon - 90]

    def step(name, call):
        now[0] += 60
        return call()

    manifest = stubs(*jobs, until="12:00")
    result = generate(manifest, tmp_path, StubModel, step=step, clock=lambda: now[0])
    assert (result.made, result.not_begun, result.failed) == (["d", "a"], ["b", "c"], {})
    result.require_all()
    result = generate(manifest, tmp_path, StubModel, step=step, clock=lambda: now[0])  # until tomorrow
    assert (result.made, result.kept, result.not_begun) == (["b", "c"], ["a", "d"], [])


@pytest.mark.parametrize(
    ("time_of_day", "hours"), [("12:00", 24), ("12:01", 1 / 60), ("11:59", 24 - 1 / 60), ("00:00", 12)]
)
def test_the_next_time_of_day_is_later_than_now(time_of_day, hours):
    noon = datetime(2030, 6, 1, 12).timestamp()
    assert next_time(time_of_day, noon) - noon == pytest.approx(3600 * hours)


@pytest.mark.parametrize(
    "value", ["7:00", "24:00", "12:60", "noon", 7, 420, 7.0, True, "07:00:00", "07:00\n", "\u0660\u0667:00"]
)
def test_what_is_no_time_of_day_is_refused(value):
    with pytest.raises(ValueError, match="until"):
        GenerateManifest.model_validate({"model": TINY, "jobs": [{"id": "a", "task": "text_to_video"}], "until": value})


@pytest.mark.parametrize("text", ["07:00", '"07:00"', "'00:30'"])
def test_a_time_needs_no_quotes(tmp_path, text):
    jobs = "jobs: [{id: a, task: text_to_video}]\n"
    (tmp_path / "a.yaml").write_text(f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\nuntil: {text}\n{jobs}')
    assert load_manifest(tmp_path / "a.yaml", tmp_path).until == text.strip("\"'")


def test_a_draft_shows_the_frames_that_have_begun_of_the_pass_that_is_under_way():
    (loop,) = manifest_of({"id": "a", "task": "loop", "num_frames": 31}, steps=4).jobs
    geometry, x0 = StubModel(TINY).backbone.geometry, torch.zeros(12, 5, 4, 4)
    drafts = [Draft.of(loop, geometry, x0, n) for n in (1, 4, 5, 8)]
    kinds = [(d.is_ring, d.frames, len(d.shown)) for d in drafts]
    assert kinds[:2] == [kinds[0]] * 2 and kinds[2:] == [kinds[3]] * 2 and kinds[0][0] is False and kinds[3][0] is True
    shows = [draft.facts()["shows"] for draft in drafts]
    assert [(about["pass"], about["passes"]) for about in shows] == [(1, 2), (1, 2), (2, 2), (2, 2)]


# The run's own manifest, and which jobs of it are named


@pytest.fixture
def drafted(tmp_path) -> Path:
    generate(stubs(drafts=2), tmp_path / "run", StubModel)
    return tmp_path / "run"


def test_the_manifest_of_a_run_gives_the_same_keys_also_where_the_folder_was_moved(drafted, tmp_path, monkeypatch):
    first = manifest_of_run(drafted)
    keys = [job.key for job in listed_jobs(drafted / "videos")[0]]
    assert [job.id for job in first.jobs] == [job["id"] for job in STUBS] and first.drafts == Drafts(steps=2)
    moved = drafted.rename(tmp_path / "moved")
    manifest = manifest_of_run(moved)
    assert next(job for job in manifest.jobs if job.id == "more").video == moved / "videos/a.mp4"
    result = generate(manifest, moved, StubModel, chosen={"more"})
    assert (set(result.made), result.unchosen) == ({"a", "more"}, ["b"])
    assert [job.key for job in listed_jobs(moved / "videos")[0]] == keys


@pytest.mark.parametrize("path", sorted(Path("manifests").glob("*/generate*.yaml")), ids=str)
def test_every_manifest_here_is_read_again_from_a_run_s_list_of_jobs(tmp_path, path):
    manifest = load_manifest(path, tmp_path)
    geometry = find_family(manifest.model.backbone).geometry
    ledger = Ledger(tmp_path / "videos", geometry, {}, InputHashes())
    (tmp_path / "videos").mkdir()
    list_jobs(ledger, {}, manifest)
    again = manifest_of_run(tmp_path)
    assert again.model_copy(update={"defaults": manifest.defaults}) == manifest
    dumps = [[json.dumps(canonical(job, geometry), default=str) for job in m.jobs] for m in (manifest, again)]
    assert dumps[0] == dumps[1], "their keys would differ"


def test_whom_a_manifest_notifies_is_listed_only_where_a_variable_names_it(tmp_path):
    generate(stubs({"id": "a"}, on_end=("https://example.com/SECRET", "env:PUSA_WEBHOOK_X")), tmp_path, StubModel)
    assert "SECRET" not in (tmp_path / "videos/.work/jobs.json").read_text()
    assert manifest_of_run(tmp_path).on_end == ("env:PUSA_WEBHOOK_X",)


def test_a_run_without_a_list_or_with_a_damaged_or_older_one_is_refused_in_a_sentence(drafted, tmp_path):
    with pytest.raises(ManifestError, match="is not the folder of a generate run"):
        manifest_of_run(tmp_path)
    path = drafted / "videos/.work/jobs.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "jobs": []}))
    with pytest.raises(MediaError, match="missing or damaged"):
        manifest_of_run(drafted)
    del content["manifest"]
    path.write_text(json.dumps({**content, "sha256": own_digest(content)}))
    with pytest.raises(ManifestError, match="earlier version"):
        manifest_of_run(drafted)


def test_jobs_are_chosen_by_ids_by_a_list_or_all(drafted, tmp_path):
    manifest, file = manifest_of_run(drafted), tmp_path / "list.txt"
    assert Chosen(all=True).ids_in(manifest) == {"a", "b", "more", "few"}
    assert Chosen(ids=("a", "few", "a")).ids_in(manifest) == {"a", "few"}
    file.write_bytes("\ufeff# chosen\r\na\r\n\r\n  more  # the long one\r\n".encode())
    assert Chosen(file=file).ids_in(manifest) == {"a", "more"}
    for chosen in (Chosen(), Chosen(ids=("a",), all=True), Chosen(ids=("a",), file=file)):
        with pytest.raises(ManifestError, match="in one way"):
            chosen.ids_in(manifest)
    with pytest.raises(
        ManifestError, match=r"command names 2 jobs that this run does not have:\n  'mroe'; did you mean 'more'\?\n"
    ):
        Chosen(ids=("mroe", "a", "../../etc/passwd")).ids_in(manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00a", "cannot be read"),
        (b"\x00\x1b[2J\n", r"list.txt names 1 job that this run does not have: '\\x00\\x1b\[2J'"),
        (b"# nothing\n\n", "names no job"),
        (b"a\n" * (5 << 20) + b"zzz\n" * (3 << 20), "too large"),
        (b"x" * (10 << 20), "names 1 job that"),
        (b"".join(b"id%d\n" % i for i in range(100_000)), "names 100,000 jobs that.*and 99,9"),
        (b"../a\n/etc/passwd\na.mp4\n", "names 3 jobs that this run does not have"),
        (None, "is not a file"),
    ],
    ids=["not UTF-8", "controls", "empty", "20 MB", "one line", "many", "paths", "a pipe"],
)  # fmt: skip
def test_a_list_that_is_none_is_refused_in_a_sentence(drafted, tmp_path, content, message):
    file = tmp_path / "list.txt"
    os.mkfifo(file) if content is None else file.write_bytes(content)
    with pytest.raises(ManifestError, match=re.compile(message, re.S)) as error:
        Chosen(file=file).ids_in(manifest_of_run(drafted))
    assert len(str(error.value)) < 5000


def test_check_and_plan_say_what_drafts_and_until_mean(tmp_path):
    manifest = stubs(drafts=2, until="07:00")
    geometry = StubModel(TINY).backbone.geometry

    def describe(*impossible: str) -> str:
        videos = tmp_path / "videos"
        return "\n".join(describe_drafts(manifest.resolve_paths(tmp_path), geometry, videos, impossible))

    lines = describe()
    assert "2 jobs wait after 2 steps (50% of theirs)" in lines and "1 with no more steps" in lines
    assert "1 that must read their results: left to `pusa finish`" in lines and "after 07:00 local time" in lines
    assert describe_drafts(stubs(), geometry, tmp_path) == []
    lines = describe("a", "more")
    assert "1 job waits after" in lines and "must read their results" not in lines
    generate(manifest, tmp_path, StubModel)
    assert "drafts: none is to come; 2 drafted already; 1 that must" in describe()
    generate(manifest, tmp_path, StubModel, chosen={"a"})
    assert "drafts: 1 job waits" in describe() and "; 1 drafted already\n" in describe(), "a is made, so more can be"


def test_a_full_disk_ends_the_run_where_the_states_of_drafts_are_saved(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pusa.generate.saved.save_verified", refuse)
        with pytest.raises(OSError, match="No space left"):
            generate(stubs(drafts=2), tmp_path, StubModel)
    assert generate(stubs(drafts=2), tmp_path, StubModel).drafted == ["a", "b"]
    monkeypatch.setattr("pusa.generate.drafts.write_poster", refuse)
    with pytest.raises(OSError, match="No space left"):
        generate(stubs(drafts=3), tmp_path, StubModel)


def test_finish_and_until_on_the_command_line(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    manifest, run = tmp_path / "m/generate.yaml", tmp_path / "run"
    jobs = "".join(f"  - {{id: {id}, task: text_to_video, prompt: a ball, seed: {i}}}\n" for i, id in enumerate("abc"))
    settings = "{width: 32, height: 32, num_frames: 7, steps: 3, guidance: 1}"
    text = (
        f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\ndrafts: {{steps: 1}}\ndefaults: {settings}\njobs:\n{jobs}'
    )
    manifest.write_text(text)
    direct = ["--no-prefect"]
    assert main(["generate", str(manifest), "--run-dir", str(run), "--until", "04:00", *direct]) == 0
    out = capsys.readouterr().out
    assert "drafted: a, b, c" in out and f"then `pusa finish {run} --list chosen.txt`" in out
    assert main(["status", str(run)]) == 0 and f"3 drafts wait: `pusa finish {run} ID...`" in capsys.readouterr().out
    assert main(["finish", str(run), "d", *direct]) == 1 and "'d'" in capsys.readouterr().err
    (tmp_path / "chosen.txt").write_text("c\n")
    assert main(["finish", str(run), "--list", str(tmp_path / "chosen.txt"), *direct]) == 0
    out = capsys.readouterr().out
    assert "made: c" in out and "not chosen: a, b" in out
    manifest.unlink()
    assert main(["finish", str(run), "a", "--place", "gpus=1023", *direct]) == 1
    assert "1023" in capsys.readouterr().err
    assert main(["finish", str(run), "c", "a", *direct]) == 0
    out = capsys.readouterr().out
    assert "made: a" in out and "made already: c" in out
    assert main(["finish", str(run), "--all", "--until", "7 o'clock", *direct]) == 2
    assert main(["finish", str(run), *direct]) == 1
    assert main(["finish", str(tmp_path / "none"), "a", *direct]) == 1
