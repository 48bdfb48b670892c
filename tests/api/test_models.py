"""A call from Python is a job of a manifest: the same key, bytes and errors. The model stays usable after each."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pusa
from pusa.api.models import LoadedModel
from pusa.errors import ConditionError, ManifestError, MediaError, NotFiniteError, PusaError, StageError, WeightsError
from pusa.generate.listed import listed_jobs, manifest_of_run
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest
from pusa.system import slots
from pusa.system.devices import Device
from pusa.system.files import read_object
from pusa.video.media import read_frames, write_image, write_video
from pusa.weights.adapters import LORA_FILE
from pusa.weights.resolve import builtin_folder
from tests.helpers.stub_model import SIZE, TINY, StubModel

REAL = {"width": 64, "height": 64, "num_frames": 31, "steps": 2, "guidance": 1.5}
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (40, 48, 3), np.uint8)
CLIP = RNG.integers(0, 256, (7, 33, 47, 3), np.uint8)  # odd sizes, which H.264 does not have


@pytest.fixture
def stub(tmp_path) -> LoadedModel:
    return LoadedModel(StubModel(TINY), tmp_path / "run", SIZE)


def made_by_manifest(job: dict, folder: Path, new_model=StubModel) -> dict:
    """Return the record of a job that a manifest makes."""
    manifest = GenerateManifest.model_validate({"model": TINY, "jobs": [{"id": "a", **job}]})
    assert generate(manifest, folder, new_model).made == ["a"]
    return read_object(folder / "videos/a.json")


# The same as a manifest


def test_a_call_gives_the_key_and_the_bytes_of_a_manifests_job(tmp_path):
    job = {"task": "text_to_video", "prompt": "a red circle", "seed": 3, **REAL}
    record = made_by_manifest(job, tmp_path / "by manifest", pusa.api.models.Model)
    video = pusa.load("builtin:tiny", run_dir=tmp_path / "run").generate(id="a", **job)
    assert video.sidecar["key"] == record["key"]
    assert video.path.read_bytes() == (tmp_path / "by manifest/videos/a.mp4").read_bytes()
    assert video.path.parent == tmp_path / "run/videos"


def pictures(folder: Path) -> dict:
    """Return one picture as a file's text, a path, a Pillow picture, and an array."""
    path = folder / "picture.png"
    write_image(path, PICTURE)
    return {"text": str(path), "path": path, "pillow": Image.fromarray(PICTURE), "array": PICTURE}


def test_arrays_and_pictures_give_the_videos_of_files_with_their_pixels(stub, tmp_path):
    for task, key in (("image_to_video", "image"), ("keyframes", "frames")):
        forms = pictures(tmp_path).values()
        given = [{0: form, -1: {"image": form, "multiplier": 0.3}} if key == "frames" else form for form in forms]
        videos = [stub.generate(task, **{key: value}) for value in given]
        assert len({video.sidecar["video_sha256"] for video in videos}) == 1
        assert len({video.path for video in videos[2:]}) == 1  # the array is the picture


def test_a_picture_keeps_its_orientation_and_what_is_transparent(stub, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.fromarray(PICTURE).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([PICTURE, PICTURE[..., :1]])).save(tmp_path / "clear.png")
    for name in ("turned.jpg", "clear.png"):
        videos = [
            stub.generate("image_to_video", image=image) for image in (tmp_path / name, Image.open(tmp_path / name))
        ]
        assert np.array_equal(videos[0].frames, videos[1].frames), name


def test_a_clip_as_an_array_is_kept_bit_for_bit(stub):
    forms = (CLIP, torch.from_numpy(CLIP), [*CLIP], [Image.fromarray(frame) for frame in CLIP])
    videos = [stub.generate("completion", video=clip, given=[0], width=32, height=32) for clip in forms]
    assert len({video.path for video in videos}) == 1
    (file,) = (stub.run_dir / "inputs").iterdir()
    assert np.array_equal(read_frames(file, range(len(CLIP))), CLIP)
    assert stub.generate("completion", video=CLIP, given=[0], fps=12).path != videos[0].path


@pytest.mark.parametrize("task", ["text_to_video", "transition", "extension", "completion", "loop", "long_video"])
def test_every_task_can_be_called(stub, task):
    made = stub.generate()
    given = {
        "transition": {"start": made, "end": CLIP, "end_frames": [-1]},
        "extension": {"video": made, "given": [0]},
        "loop": {"num_frames": 13},
        "completion": {"video": made, "given": [0]},
        "long_video": {"num_frames": 13, "window": 13},
    }
    video = stub.generate(task, **given.get(task, {}))
    assert video.sidecar["job"]["task"] == task and video.frames.dtype == np.uint8
    assert video.frames.shape == (round(video.seconds * video.fps), 32, 32, 3)


def test_numbers_of_numpy_and_torch_are_numbers(stub):
    for multiplier in (*np.linspace(0, 0.5, 2), torch.tensor(0.25, dtype=torch.bfloat16)):
        video = stub.generate("image_to_video", image=PICTURE, multiplier=multiplier, seed=np.int64(3))
        assert video.sidecar["job"]["multiplier"] == multiplier and f"multiplier {float(multiplier)}, seed 3" in repr(
            video
        )
    assert "multiplier" not in repr(stub.generate("image_to_video", image=PICTURE))


# Made once, kept, replaced


def test_an_equal_call_computes_nothing(tmp_path):
    class Once(StubModel):
        def decode_chunks(self, z_CFhw):
            assert not list((tmp_path / "run/videos").glob("*.mp4")), "decoded again"
            return super().decode_chunks(z_CFhw)

    models = [LoadedModel(Once(TINY), tmp_path / "run", SIZE) for _ in range(2)]
    videos = [model.generate(prompt="a red circle") for model in (models[0], models[0], models[1])]
    assert len({video.path for video in videos}) == 1


def test_different_calls_have_different_files_and_an_own_id_is_replaced(stub):
    first, second = stub.generate(seed=1), stub.generate(seed=2)
    assert first.path != second.path and first.path.exists()
    named = stub.generate(id="mine", seed=1)
    other = stub.generate(id="mine", seed=2)
    assert named.path == other.path and other.latents.shape == first.latents.shape
    for use in (lambda: named.frames, lambda: named.save(stub.run_dir / "saved.mp4")):
        with pytest.raises(MediaError, match="replaced by another video of the same id"):
            use()
    assert "replaced by another" in named._repr_html_() and not (stub.run_dir / "saved.mp4").exists()
    assert "<video" in other._repr_html_()


def test_a_temporary_folder_lives_as_long_as_the_model_or_a_video():
    model = LoadedModel(StubModel(TINY), defaults=SIZE)
    folder, video = model.run_dir, model.generate()
    del model
    gc.collect()
    assert video.latents.ndim == 4 and video.path.exists()
    del video
    gc.collect()
    assert not folder.exists()


def test_what_commands_know_of_a_run_stays_as_it_is(stub):
    """A call is not the manifest of a run: neither in `pusa status` nor in `pusa finish` nor in the gallery."""
    made_by_manifest({"task": "text_to_video", **SIZE}, stub.run_dir)
    files = [stub.run_dir / "videos" / name for name in (".work/jobs.json", "gallery.html", "gallery.jpg")]
    before = [path.read_bytes() for path in files]
    kept = stub.generate(id="a")
    assert [path.read_bytes() for path in files] == before
    other = stub.generate(seed=5)
    assert np.array_equal(stub.generate(id="a", seed=5).frames, other.frames)
    assert [path.read_bytes() for path in files] == before
    assert {row.id: row.key for row in listed_jobs(stub.run_dir / "videos")[0]} == {"a": kept.sidecar["key"]}
    assert [job.id for job in manifest_of_run(stub.run_dir).jobs] == ["a"]


def test_calls_alone_list_no_jobs(stub):
    stub.generate()
    assert not list(stub.run_dir.rglob("jobs.json"))


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"task": "image_to_vidoe"}, ManifestError, "^unknown task 'image_to_vidoe'; did you mean 'image_to_video'"),
        ({"task": "a red circle"}, ManifestError, "^task is 'a red circle'; expected one of .* and prompt='...'"),
        ({"promt": "x"}, ManifestError, "^text_to_video.promt: unknown key; did you mean 'prompt'"),
        ({"task": "image_to_video"}, ManifestError, "^image_to_video.image: Field required"),
        (
            {"steps": 0, "fps": "fast"},
            ManifestError,
            r"^2 problems:\n  text_to_video\.fps: .*\n  text_to_video\.steps: ",
        ),
        ({"sweep": {"seed": [1, 2]}}, ManifestError, "^text_to_video.sweep: unknown key"),
        ({"width": 33}, ConditionError, "33"),
        ({"id": "../x"}, ManifestError, "^text_to_video.id: '../x' is not an id"),
        ({"task": "image_to_video", "image": "missing.png"}, MediaError, "missing.png"),
        ({"task": "image_to_video", "image": PICTURE / 255.0}, MediaError, "^image: an array of shape .*float64"),
        ({"task": "image_to_video", "image": PICTURE[..., 0]}, MediaError, r"^image: an array of shape \(40, 48\)"),
        ({"task": "image_to_video", "image": CLIP}, PusaError, "mkv"),
        (
            {"task": "image_to_video", "image": Image.new("F", (8, 8))},
            MediaError,
            "^image: a picture of mode F; expected",
        ),
        ({"id": ""}, ManifestError, "^text_to_video.id: '' is not an id"),
        ({"task": "keyframes", "frames": {0: None}}, ManifestError, "^keyframes.frames.0: "),
        ({"task": "keyframes", "frames": {99: PICTURE}}, ConditionError, "position 99 is outside"),
        ({"task": 3}, ManifestError, "task"),
        ({"prompt": "x" * 10_001}, ManifestError, "^text_to_video.prompt: "),
        (
            {"task": "extension", "video": [PICTURE, PICTURE[1:]]},
            MediaError,
            "^video: pictures of the shapes .*one size",
        ),
        (
            {"task": "image_to_video", "image": torch.ones(3, 8, 8)},
            MediaError,
            r"^image: an array of shape \(3, 8, 8\)",
        ),
    ],
)
def test_a_wrong_call_raises_one_clear_error(stub, call, error, message):
    with pytest.raises(error, match=message) as raised:
        stub.generate(**call)
    assert "jobs.0" not in str(raised.value)
    assert stub.generate().path.exists()


@pytest.mark.parametrize("weights", ["builtin:tiny-wan-pusa", builtin_folder("builtin:tiny-wan"), "builtin:tiny"])
def test_the_backbone_is_the_one_that_has_the_weights_settings(weights):
    assert pusa.load(weights).spec.backbone == ("mochi" if weights == "builtin:tiny" else "wan2.1")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": "builtin:tyni"}, WeightsError, "tyni"),
        ({"weights": "nowhere"}, WeightsError, "nowhere"),
        ({"weights": "builtin:tiny-wan", "backbone": "mochi"}, WeightsError, "AutoencoderKLMochi"),
        ({"weights": "builtin:tiny", "backbon": "x"}, ManifestError, "^backbon: unknown key; did you mean 'backbone'"),
        ({"weights": "builtin:tiny", "defaults": {"stesp": 3}}, ManifestError, "^defaults.stesp: unknown key"),
        ({"weights": "builtin:tiny", "device": "gpu"}, ManifestError, "device is 'gpu'"),
        ({"weights": "builtin:tiny", "device": "cuda:77"}, ManifestError, "device is 'cuda:77'"),
    ],
)
def test_a_wrong_model_is_refused_when_it_is_loaded(arguments, error, message):
    with pytest.raises(error, match=message):
        pusa.load(**arguments)


@pytest.mark.parametrize(("file", "key"), [("transformer/config.json", "checkpoint"), (LORA_FILE, "lora")])
def test_a_checkpoint_as_weights_is_refused_with_the_key_to_use(tmp_path, file, key):
    (tmp_path / "transformer").mkdir()
    for name, content in ((file, {}), ("checkpoint.json", {"base": {"weights": "builtin:tiny"}})):
        (tmp_path / name).write_text(json.dumps(content))
    message = f"is a checkpoint of `pusa finetune`: give it as `{key}`, with its base, builtin:tiny, as `weights`"
    with pytest.raises(WeightsError, match=re.escape(message)):
        pusa.load(tmp_path)


def test_a_model_shows_its_checkpoint_and_its_loras():
    shown = repr(pusa.load("builtin:tiny", checkpoint="builtin:tiny-pusa", latent_space="dit"))
    assert shown.startswith("<LoadedModel builtin:tiny (mochi, checkpoint builtin:tiny-pusa) on ")
    shown = repr(pusa.load("builtin:tiny-wan", loras=[{"weights": "builtin:tiny-wan-pusa", "strength": 1.5}]))
    assert "(wan2.1, LoRA builtin:tiny-wan-pusa * 1.5) on " in shown


def test_a_failed_job_raises_the_error_that_it_had(tmp_path):
    class Fails(StubModel):
        error = NotFiniteError("the VAE computes nothing")

        def decode_chunks(self, z_CFhw):
            if self.error:
                raise self.error
            return super().decode_chunks(z_CFhw)

    model = Fails(TINY)
    loaded = LoadedModel(model, tmp_path, SIZE)
    with pytest.raises(NotFiniteError, match="the VAE computes nothing"):
        loaded.generate()
    model.error = KeyError("defect")
    with pytest.raises(StageError, match="KeyError") as raised:
        loaded.generate()
    assert "decode_chunks" in raised.value.__notes__[0]
    model.error = None
    assert loaded.generate().path.exists()


def test_an_interrupt_leaves_the_model_usable(tmp_path):
    class Interrupted(StubModel):
        interrupts = True

        def decode_chunks(self, z_CFhw):
            yield from super().decode_chunks(z_CFhw)
            if self.interrupts:
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(60)

    model = Interrupted(TINY)
    loaded = LoadedModel(model, tmp_path, SIZE)
    with pytest.raises(KeyboardInterrupt):
        loaded.generate(id="a")
    model.interrupts = False
    record = made_by_manifest({"task": "text_to_video", **SIZE}, tmp_path / "by manifest")
    assert loaded.generate(id="a").sidecar["video_sha256"] == record["video_sha256"]
    assert not list((tmp_path / "videos/.work").iterdir())


# Where it computes


def test_gpus_do_not_take_the_work_out_of_this_process(stub, monkeypatch):
    monkeypatch.setattr(slots, "visible_gpus", lambda: [Device("0", "GPU-0")])
    video = stub.generate()
    assert video.path.exists() and video.sidecar["made_by"].endswith(" cpu")


def test_two_models_in_two_threads_make_what_each_makes_alone(tmp_path):
    def make(name: str, folder: str) -> list:
        model = pusa.load(name, run_dir=tmp_path / folder / name, defaults={**REAL, "num_frames": 13, "steps": 1})
        return [model.generate(prompt="a red circle", seed=seed).sidecar["video_sha256"] for seed in range(2)]

    names = ["builtin:tiny", "builtin:tiny-wan"]
    alone = [make(name, "alone") for name in names]
    together: dict[str, list] = {}
    threads = [threading.Thread(target=lambda name=name: together.update({name: make(name, "both")})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[name] for name in names] == alone and alone[0] != alone[1]


def test_the_weights_stay_loaded(tmp_path):
    model = pusa.load("builtin:tiny", run_dir=tmp_path, defaults=REAL)
    model.generate()
    loaded = dict(model._model._loaded)
    model.generate(seed=1)
    assert loaded and model._model._loaded == loaded
    assert model.generate(seed=1).latents.dtype == torch.float32


# The package


def test_import_is_light_and_the_names_are_listed():
    code = """
import sys, pusa
assert {"load", "run", "PusaPipeline"} <= set(dir(pusa))
assert issubclass(pusa.PartlyFailed, pusa.PusaError)
heavy = {"torch", "numpy", "pydantic", "diffusers", "pusa.api"} & set(sys.modules)
assert not heavy, heavy
try:
    pusa.laod
except AttributeError as error:
    assert "laod" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_program_that_does_not_ask_for_the_log_sees_no_log(tmp_path):
    code = "import logging, pusa; logging.getLogger('pusa.generate').error('seen')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_video_file_may_be_given(stub, tmp_path):
    write_video(tmp_path / "clip.mp4", CLIP[:, :32, :32], 24)
    assert stub.generate("extension", video=tmp_path / "clip.mp4", given=[0]).path.exists()
