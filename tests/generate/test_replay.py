"""A video is made again from what it says about itself: bit for bit, or the first thing that differs has a name."""

import json
import os
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flows.commands import main
from pusa.errors import ManifestError, MediaError, WeightsError
from pusa.generate import recorded as recorded_facts
from pusa.generate.encodings import Encodings
from pusa.generate.latents import read_latents
from pusa.generate.ledger import InputHashes, Keys, Ledger
from pusa.generate.recorded import find_inputs, job_of, model_of, read_recorded
from pusa.generate.records import describe_provenance
from pusa.generate.replay import _company_of, replay
from pusa.generate.sampling import prepare, sample_together
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest
from pusa.system.files import sha256_file
from pusa.tasks import TASKS
from pusa.video.media import read_frames, write_video
from pusa.video.provenance import XMP_BOX, append_packet, read_provenance
from pusa.weights.model import Model
from tests.helpers.stub_model import TINY, StubModel, manifest_of

SIZE = {"width": 32, "height": 32, "num_frames": 13, "steps": 2, "guidance": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two jobs that were sampled in one batch; the second has a picture, which lies above the videos."""
    run = tmp_path_factory.mktemp("made")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(run / "ball.png")
    jobs = [
        {"id": "text", "task": "text_to_video", "prompt": "a red ball moves to the left", "seed": 7, **SIZE},
        {"id": "image", "task": "image_to_video", "image": run / "ball.png", "prompt": "a ball", **SIZE},
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generate(GenerateManifest.model_validate({"model": TINY, "jobs": jobs}), run)
    finally:
        torch.set_num_threads(threads)
    return run / "videos"


@pytest.fixture
def video(made, tmp_path):
    """Copies a video of the run, with its picture, to a folder of its own; returns its path."""

    def copy(id="image"):
        shutil.copy(made.parent / "ball.png", tmp_path)
        return shutil.copy(made / f"{id}.mp4", tmp_path / "moved.mp4")

    return copy


def edit(path, change):
    """Replace what a video says by what `change` makes of its facts, in place. The frames stay."""
    said = read_provenance(path)
    facts = json.loads(json.dumps(said.facts))
    change(facts)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(struct.pack(">4s16s", b"uuid", XMP_BOX)) - 4])
    append_packet(path, replace(said, facts=facts))
    return path


@pytest.mark.parametrize("id", ["text", "image"])
def test_a_video_is_made_again_bit_for_bit_from_itself_alone(video, tmp_path, capsys, id):
    path = video(id)
    assert len(read_recorded(path).batch.tokens) == 2
    assert main(["replay", str(path), "--output", str(tmp_path / "new/again.mp4")]) == 0
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["again.mp4"]
    assert capsys.readouterr().out == "identical: all 13 frames, and every byte of the file\n"
    assert sha256_file(tmp_path / "new/again.mp4") == sha256_file(path)


def test_copies_of_a_job_stand_for_the_others_of_its_batch_to_the_last_bit(made):
    for id in ("text", "image"):
        recorded = read_recorded(made / f"{id}.mp4")
        spec = model_of(recorded, ())
        found, _ = find_inputs(recorded, [made.parent])
        job, model = job_of(recorded, spec, found, made / f"{id}.mp4"), Model(spec, "cpu")
        prepared = prepare(job, model, Encodings(model, None), InputHashes())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        z_CFhw = sample_together(_company_of(prepared, recorded.batch), model)[recorded.batch.position]
        torch.set_num_threads(threads)
        assert torch.equal(z_CFhw, read_latents(made / f"{id}.latents.safetensors"))


def change_picture(path):
    Image.new("RGB", (32, 32), "red").save(path.with_name("ball.png"))


def change_weights(path):
    edit(path, lambda facts: facts["weights"].update(vae="0123456789abcdef"))


def change_seed(path):
    edit(path, lambda facts: facts["job"].update(seed=8))


def change_package(path):
    edit(path, lambda facts: facts["packages"].update(torch="2.0.0"))


def change_device(path):
    edit(path, lambda facts: facts.update(device="NVIDIA H200"))


def change_version(path):
    edit(path, lambda facts: facts["packages"].update(pusa="9.9.9", torch="2.0.0"))


def change_kernels(path):
    edit(path, lambda facts: facts["kernels"].update(deterministic=True))


def change_cores(path):
    edit(path, lambda facts: facts.update(cores=1024))


FLIPS = {
    change_version: "version of pusa: 0.1.0 here, 9.9.9 in the video",
    change_weights: "weights of vae: ",
    change_picture: "input ball.png: ",
    change_seed: "settings: their key is ",
    change_package: "package torch: ",
    change_device: "device: cpu here, NVIDIA H200 in the video",
    change_kernels: "kernel setting deterministic: False here, True in the video",
    change_cores: "cores: ",
}


@pytest.mark.parametrize("flip, name", FLIPS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_one_thing_is_flipped_and_named(video, capsys, flip, name):
    path = video()
    flip(path)
    assert main(["replay", str(path), "--check"]) == 3
    out = capsys.readouterr().out
    assert out.startswith(f"differs: {name}"), out


def test_without_a_difference_a_check_says_so(video, capsys):
    assert main(["replay", str(video()), "--check"]) == 0
    assert capsys.readouterr().out == "all recorded facts are equal; nothing was made (--check)\n"


def test_other_settings_give_other_frames_and_the_name_of_the_cause(video, capsys):
    path = video()
    change_seed(path)
    assert main(["replay", str(path)]) == 3
    out = capsys.readouterr().out
    assert (
        out.startswith("differs: settings: their key is ")
        and "frame 1 differs, with 12 of 13 frames, by at most " in out
    )


def test_equal_facts_and_other_frames_are_told_apart(video):
    """As after a video was encoded again by another program that kept the packet."""
    path = video("text")
    said, frames = read_provenance(path), read_frames(path, range(13)).copy()
    frames[12] = 255 - frames[12]
    write_video(path, frames, 24)
    append_packet(path, said)
    result = replay(path)
    assert not result.is_identical and result.text().startswith("all recorded facts are equal, but frame ")
    write_video(path, frames[:7], 24)
    append_packet(path, said)
    assert "the video has 7 frames of 32x32, and made again 13 frames of 32x32" in replay(path).text()


def test_a_fact_without_effect_is_named_and_the_frames_are_identical(video, capsys):
    path = video("text")
    change_package(path)
    assert main(["replay", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("identical: all 13 frames; the bytes of the file differ: package torch: ")


def test_the_settings_of_a_manifest_are_compared_by_name(video, tmp_path, capsys):
    manifest = tmp_path / "generate.yaml"
    manifest.write_text(
        "kind: generate\nmodel: {weights: 'builtin:tiny'}\ndefaults: {width: 32, height: 32, num_frames: 13}\n"
        "jobs: [{id: text, task: text_to_video, prompt: a red ball moves to the left, steps: 2, guidance: 1}]\n"
    )
    assert main(["replay", str(video("text")), "--manifest", str(manifest), "--check"]) == 3
    assert capsys.readouterr().out == "differs: setting seed: 0 in the manifest, 7 in the video\n"


def test_inputs_are_found_by_content_beside_the_video_or_in_a_folder(video, tmp_path):
    path, other = video(), tmp_path / "inputs"
    other.mkdir()
    (tmp_path / "ball.png").rename(tmp_path / "renamed.png")
    assert replay(path, check=True).is_identical
    (tmp_path / "renamed.png").rename(other / "renamed.png")
    with pytest.raises(
        MediaError, match=r"input 'ball.png' with the sha256 .* is not in .*; name its folder with --inputs"
    ):
        replay(path, check=True)
    assert replay(path, inputs=other, check=True).is_identical


def test_local_weights_are_named_without_their_path_and_found_by_fingerprint(tmp_path):
    from pusa.weights.resolve import builtin_folder

    run = tmp_path / "run"
    local = shutil.copytree(builtin_folder("builtin:tiny"), tmp_path / "secret place/tiny-copy")
    job = {"id": "a", "task": "text_to_video", **SIZE, "num_frames": 7, "steps": 1}
    generate(GenerateManifest.model_validate({"model": {"weights": str(local)}, "jobs": [job]}), run)
    path = run / "videos/a.mp4"
    assert read_recorded(path).model["weights"] == "local:tiny-copy" and b"secret place" not in path.read_bytes()
    with pytest.raises(WeightsError, match="local weights 'tiny-copy'; name them with --weights, or --manifest"):
        replay(path)
    for folder in (local, local.parent):
        assert replay(path, weights=[folder], check=True).is_identical
    assert replay(path, weights=[local]).same_bytes
    other = replay(path, weights=[builtin_folder("builtin:tiny-pusa")], check=True)
    assert other.differences[0].startswith("weights of transformer: ")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda facts: facts["job"].update(image="/etc/hostname"), "/etc/hostname is not an input of the video"),
        (lambda facts: facts["job"].update(levels="/etc/x.npy"), "expected a matrix"),
        (
            lambda facts: facts["job"]["image"].update(file="../ball.png"),
            "expected the name of a file, without a folder",
        ),
        (lambda facts: facts["job"].update(width=10**9), "width: .*8192"),
        (lambda facts: facts["job"].update(new_key=1), "new_key: unknown key"),
        (lambda facts: facts["model"].update(weights="/srv/secret"), "names weights '/srv/secret'; expected builtin:"),
        (lambda facts: facts["model"].update(weights="builtin:../../x"), "unknown built-in model"),
        (lambda facts: facts["model"].update(weights="local:../../x"), "local weights"),
        (lambda facts: facts.pop("key"), "settings that are damaged: key"),
        (lambda facts: facts["batch"].update(position=99), "batch has no job 99"),
        (lambda facts: facts["batch"].update(tokens=[[0, 0]] * 5_000), "settings that are damaged: batch.tokens"),
        (lambda facts: facts.update(left_out=["job"]), r"does not hold \['job'\], which was too large"),
        (lambda facts: facts.update(format=2), "settings that are damaged: format"),
    ],
)
def test_hostile_settings_are_refused_before_anything_is_made(video, change, message):
    path = edit(video(), change)
    with pytest.raises((MediaError, ManifestError, WeightsError), match=message):
        replay(path)


def test_what_holds_no_settings_is_a_sentence(video, tmp_path, capsys):
    silent = tmp_path / "silent.mp4"
    write_video(silent, np.zeros((2, 32, 32, 3), np.uint8), 24)
    assert main(["replay", str(silent)]) == 1
    assert "does not say how it was made: expected an mp4 of `pusa generate`" in capsys.readouterr().err
    edit(path := video(), lambda facts: facts.clear())
    assert main(["replay", str(path)]) == 1 and "as with `embed: none`" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "none.mp4")]) == 1 and "cannot be read" in capsys.readouterr().err
    for output, why in ((silent, "exists"), (tmp_path / "new.gif", "is not the name of an mp4")):
        assert main(["replay", str(video()), "--output", str(output)]) == 1
        assert f"{output} {why}; expected a new file that ends in .mp4" in capsys.readouterr().err


JOBS = {
    "text_to_video": {},
    "image_to_video": {"image": "{png}", "multiplier": 0.3},
    "keyframes": {"frames": {0: {"image": "{png}"}, -1: {"image": "{png}", "multiplier": 0.5}}},
    "extension": {"video": "{mp4}"},
    "transition": {"start": "{mp4}", "end": "{mp4}"},
    "completion": {"video": "{mp4}", "given": [0, 2]},
    "loop": {},
    "long_video": {"window": 31},
}


def test_the_settings_of_every_task_are_read_as_they_were_written(tmp_path):
    """A job that was validated, written and read has the same key, whatever types its defaults have."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", np.zeros((13, 32, 32, 3), np.uint8), 24)
    places = {"{png}": tmp_path / "a.png", "{mp4}": tmp_path / "a.mp4"}

    def placed(value):
        if isinstance(value, dict):
            return {key: placed(inner) for key, inner in value.items()}
        return places.get(value, value) if isinstance(value, str) else value

    model = StubModel(TINY)
    checked = set()
    for task in TASKS:
        if task not in JOBS:
            continue
        for more in ({}, {"fps": 24, "guidance": 2}, {"fps": 12.5, "prompt": "a\u2028\0b"}):
            (job,) = manifest_of({"id": "a", "task": task, **placed(JOBS[task]), **more}).jobs
            keys = Ledger(tmp_path, model.backbone.geometry, {"transformer": "stub"}, InputHashes()).keys_of(job)
            said = describe_provenance(job, keys.video, model, {"transformer": "stub"}, sha256_file)
            facts = recorded_facts.Recorded.model_validate(json.loads(json.dumps(said.facts)))
            found, changed = find_inputs(facts, [tmp_path])
            again = job_of(facts, TINY, found, tmp_path / "x.mp4")
            assert again == job and not changed, task
            assert isinstance(keys, Keys) and recorded_facts._compare_settings(facts, again, model, found, None) == []
            checked.add(task)
    assert checked == set(JOBS) & set(TASKS) and len(checked) >= 6


def test_embed_none_leaves_prompt_and_settings_out_and_changes_no_frame(tmp_path):
    def make(embed):
        generate(
            manifest_of({"id": "a", "prompt": "a secret prompt", "formats": ("webm",), "embed": embed}),
            tmp_path,
            StubModel,
        )
        return tmp_path / "videos/a.mp4", json.loads((tmp_path / "videos/a.json").read_text())

    video, first = make("all")
    frames = read_frames(video, range(7))
    assert b"a secret prompt" in video.read_bytes() and b"a secret prompt" in video.with_suffix(".webm").read_bytes()
    video, second = make("none")
    assert b"secret" not in video.read_bytes() and b"secret" not in video.with_suffix(".webm").read_bytes()
    said = read_provenance(video)
    assert (said.title, said.prompt, said.facts) == ("a", "", None) and said.maker.startswith("pusa ")
    assert first["key"] == second["key"] and np.array_equal(frames, read_frames(video, range(7)))
    assert "sample" in first["seconds"] and "sample" not in second["seconds"], "it is decoded again, and not sampled"
    assert not os.path.exists(tmp_path / "videos/.old")
    assert make("none")[1] == second, "it is done"


def test_a_video_of_an_earlier_version_stays_as_it_is(tmp_path):
    generate(manifest_of({"id": "a"}), tmp_path, StubModel)
    path = tmp_path / "videos/a.json"
    record = json.loads(path.read_text())
    del record["job"]["embed"], record["sha256"]
    path.write_text(json.dumps(record))
    for embed in ("all", "none"):
        assert generate(manifest_of({"id": "a", "embed": embed}), tmp_path, StubModel).kept == ["a"]


def test_formats_and_priority_change_no_byte_of_the_mp4(tmp_path):
    for folder, more in (("a", {}), ("b", {"formats": ("lossless",), "priority": 3})):
        generate(manifest_of({"id": "a", **more}), tmp_path / folder, StubModel)
    assert sha256_file(tmp_path / "a/videos/a.mp4") == sha256_file(tmp_path / "b/videos/a.mp4")
