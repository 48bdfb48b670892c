"""Previews: the latents' colours without decoding. They change no result and cost no job, and are fitted once."""

import errno
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from pusa.backbones.family import Geometry
from pusa.diffusion.latent_spaces import LATENT_SPACES
from pusa.errors import MediaError, NoMemoryError
from pusa.generate import previews, worker
from pusa.generate.encodings import Encodings, encodings_folder
from pusa.generate.previews import Previews, draw_clips, fit_colours, mean_colours, picture
from pusa.generate.sampling import Prepared, PreparedPass
from pusa.generate.stage import generate
from pusa.manifest.models import ModelSpec
from pusa.system.files import PARTIAL
from pusa.tiny import shapes
from pusa.weights.model import Model
from tests.generate.test_ledger import contents, in_child
from tests.helpers.stub_model import TINY, StubModel, manifest_of

MIX = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
MEAN, STD = (torch.linspace(*ends, 12).view(-1, 1, 1, 1) for ends in ((-1, 1), (0.5, 2)))
RED, GREEN = ("red", "circle"), ("green", "square")
THREE = ({"id": "a", "num_frames": 13}, {"id": "b", "num_frames": 13}, {"id": "c", "steps": 3})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache, monkeypatch):
    monkeypatch.setenv("PUSA_CACHE", str(cache))


class LinearModel(StubModel):
    """Its VAE mixes the mean colours of each place to 12 channels, so that a map back is exact."""

    space_name = "dit"
    encoded = 0

    def __init__(self, spec=TINY):
        super().__init__(spec)
        self.space = LATENT_SPACES[self.space_name](MEAN, STD)

    def posterior(self, frames_BTHWC, tile=0):
        LinearModel.encoded += len(frames_BTHWC)
        x = (mean_colours(frames_BTHWC, self.backbone.geometry).float() @ MIX).movedim(-1, 1) * STD + MEAN
        return x, x


class PublishedModel(LinearModel):
    space_name = "vae"


class NoDecoder(LinearModel):
    """Cannot decode, so that previews stay what they were before there is a video."""

    def decode_chunks(self, z_CFhw):
        raise MediaError("no decoder")


class NoRoom(LinearModel):
    def posterior(self, frames_BTHWC, tile=0):
        raise NoMemoryError("too small")


def prepared(job) -> Prepared:
    return Prepared(
        job, None, None, tuple(PreparedPass(run, ()) for run in job.passes(StubModel(TINY).backbone.geometry))
    )


def showing(folder, every=1) -> Previews:
    model = LinearModel()
    made = Previews(folder, every, model, Encodings(model, encodings_folder()))
    made.fit()
    return made


@pytest.mark.parametrize(("backbone", "weights", "least"), [("mochi", "tiny", 0.95), ("wan2.1", "tiny-wan", 0.5)])
def test_the_map_shows_what_a_real_vae_decodes(backbone, weights, least):
    model = Model(ModelSpec(backbone=backbone, weights=f"builtin:{weights}"), "cpu")
    map_C1c, geometry = fit_colours(model), model.backbone.geometry
    scenes = [shapes.Scene((thing,), "grow", ground, 3) for thing, ground in ((RED, "dark"), (GREEN, "light"))]
    z_CFhw = torch.cat([model.encode(shapes.draw(scene, num_frames=geometry.num_frames(3))) for scene in scenes], 1)
    shown = torch.einsum("cfhw,cd->fhwd", z_CFhw, map_C1c[:-1]).add(map_C1c[-1]).clamp(0, 1)
    decoded = np.stack([model.decode(part) for part in z_CFhw.chunk(2, 1)])
    wanted = mean_colours(decoded, geometry).flatten(0, 1)
    wrong, spread = (shown - wanted).square().mean(), wanted.var((0, 1, 2)).mean()
    assert 1 - wrong / spread > least
    red, green = shown[2, 4, 4].tolist(), shown[5, 4, 4].tolist()
    assert red[0] > 1.5 * max(red[1:]) and green[1] > 1.2 * max(green[0], green[2])


@pytest.mark.parametrize("kind", [LinearModel, PublishedModel])
def test_the_map_undoes_a_linear_vae_in_both_latent_spaces(kind):
    """Sampled latents of the published space, too, are decoded after z * std + mean."""
    model = kind()
    y = torch.rand(3, 4, 5, 3, generator=torch.Generator().manual_seed(2))
    z_CFhw = (y @ MIX).movedim(-1, 0)  # which `leave` turns into what the VAE gives for these colours
    map_C1c = fit_colours(model)
    shown = torch.einsum("cfhw,cd->fhwd", z_CFhw, map_C1c[:-1]) + map_C1c[-1]
    assert (shown - y).abs().max() < 0.05


def test_mean_colours_are_of_the_frames_and_pixels_of_each_place():
    geometry = Geometry(2, 3, 1, 4)
    frames = np.zeros((1, 4, 2, 4, 3), np.uint8)
    frames[0, 0, :, :2], frames[0, 1, :, 2:, 1], frames[0, 3, 0, 2, 1] = 255, 51, 102
    found = mean_colours(frames, geometry)
    assert found.shape == (1, 2, 1, 2, 3)
    assert found[0, 0, 0].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert found[0, 1, 0, 0].tolist() == [0, 0, 0]
    assert found[0, 1, 0, 1].tolist() == pytest.approx([0, (4 * 0.2 + 0.4) / 12, 0])


def test_drawn_clips_are_the_same_everywhere_still_and_moving_and_of_many_colours():
    clips = draw_clips(Geometry(16, 4, 2, 48))
    assert clips.shape == (12, 13, 128, 128, 3)
    moves = [np.abs(np.diff(clip.astype(int), axis=0)).mean() for clip in clips]
    assert max(moves[::2]) == 0 and min(moves[1::2]) > 0
    greys = (np.ptp(clips.astype(int), axis=-1) < 8).mean()
    assert 0.02 < greys < 0.5 and clips.min() == 0 and clips.max() == 255
    assert draw_clips(Geometry(48, 6, 2, 12)).shape[2] == 192, "a legal size of any family"


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((6, 8, 8), (160, 960)), ((1, 8, 8), (160, 160)), ((2, 8, 8), (160, 320)), ((28, 60, 106), (160, 849)),
        ((21, 90, 160), (160, 852)), ((21, 160, 90), (160, 540)), ((3, 1, 100), (10, 960)), ((3, 100, 1), (160, 6)),
    ],
)  # fmt: skip
def test_a_strip_is_small_and_shows_the_first_and_the_last(shape, size):
    map_C1c = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    z_CFhw = torch.zeros(3, *shape)
    z_CFhw[0, 0], z_CFhw[2, -1] = 1, 1
    strip = picture(map_C1c, z_CFhw, [True] * shape[0])
    assert strip.dtype == np.uint8 and strip.shape == (*size, 3)
    assert strip[0, 0, 0] == 255 and (strip[0, -1, 2] == 255 or shape[1:] == (1, 100))


def test_latent_frames_that_wait_and_values_that_are_not_finite_are_grey():
    map_C1c = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    z_CFhw = torch.ones(3, 3, 2, 2)
    z_CFhw[:, 1] = float("nan")
    strip = picture(map_C1c, z_CFhw, [True, True, False])
    assert [strip[80, x].tolist() for x in (80, 240, 400)] == [[255] * 3, [128] * 3, [128] * 3]


def test_frames_of_a_long_video_are_grey_until_they_begin(tmp_path):
    (job,) = manifest_of(
        {"id": "long", "task": "long_video", "num_frames": 43, "window": 31, "overlap": 2, "steps": 2}
    ).jobs
    x0_BCFhw = torch.ones(1, 12, 8, 4, 4) * 9
    made, seen = showing(tmp_path), []
    for done in (1, 2, 3, 4):
        made.show([prepared(job)], {"long"}, done, x0_BCFhw)
        strip = np.asarray(Image.open(tmp_path / "previews/long.jpg"))
        seen.append([bool(np.abs(strip[80, x].astype(int) - 128).max() > 10) for x in (80, 880)])
    assert seen == [[True, False], [True, False], [True, True], [True, True]]


def test_a_picture_is_written_every_few_steps_and_at_last_for_the_named_jobs_alone(tmp_path):
    jobs = manifest_of(*({"id": id, "steps": 5} for id in "ab")).jobs
    made, path, written = showing(tmp_path, every=2), tmp_path / "previews/b.jpg", []
    for done in range(1, 6):
        made.show([prepared(job) for job in jobs], {"b"}, done, torch.full((2, 12, 2, 4, 4), float(done)))
        if path.exists():
            assert [file.name for file in path.parent.iterdir()] == ["b.jpg"]
            path.unlink()
            written.append(done)
    assert written == [2, 4, 5]


def test_nothing_else_of_a_run_changes(tmp_path):
    """Not a byte of a video or of latents, not a key, not the global random state."""
    runs = {}
    for every in (0, 1):
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        manifest = manifest_of(*THREE).model_copy(update={"preview_every": every})
        assert generate(manifest, tmp_path / str(every), LinearModel).made == ["a", "b", "c"]
        assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()
        runs[every] = contents(tmp_path / str(every))
    assert runs[0] == runs[1]
    again = generate(manifest_of(*THREE), tmp_path / "1", LinearModel)
    assert again.kept == ["a", "b", "c"] and not again.made


def test_the_preview_of_a_job_that_failed_stays_and_the_map_is_fitted_once_for_all_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    before = LinearModel.encoded
    for run in ("one", "two"):
        manifest = manifest_of(*THREE).model_copy(update={"preview_every": 2})
        assert set(generate(manifest, tmp_path / run, NoDecoder).failed) == {"a", "b", "c"}
        for id, width in {"a": 480, "b": 480, "c": 320}.items():
            assert Image.open(tmp_path / run / f"videos/previews/{id}.jpg").size == (width, 160)
    assert LinearModel.encoded - before == previews.CLIPS


def test_without_previews_nothing_is_fitted_or_written(tmp_path):
    before = LinearModel.encoded
    generate(manifest_of({"id": "a"}), tmp_path, NoDecoder)
    assert LinearModel.encoded == before and not (tmp_path / "videos/previews").exists()


def test_a_vae_without_memory_costs_the_previews_and_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("PUSA_CACHE", "")
    manifest = manifest_of(*THREE).model_copy(update={"preview_every": 1})
    made = generate(manifest, tmp_path, NoRoom)
    assert made.made == ["a", "b", "c"]
    (warning,) = [record.message for record in caplog.records if "preview" in record.message]
    assert warning.startswith("no previews are written: ") and "does not fit in memory" in warning


@pytest.mark.parametrize("obstacle", ["file", "link", "folder of its name", "gone", "full"])
def test_a_picture_that_cannot_be_written_is_one_warning(tmp_path, caplog, monkeypatch, obstacle):
    folder, elsewhere = tmp_path / "run/videos", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if obstacle != "gone":
        folder.mkdir(parents=True)
    if obstacle == "file":
        (folder / "previews").write_text("mine")
    elif obstacle == "link":
        (folder / "previews").symlink_to(elsewhere)
    elif obstacle == "folder of its name":
        (folder / "previews/a.jpg/mine").mkdir(parents=True)
    elif obstacle == "full":

        def full(path, frame):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(previews, "write_image", full)
    (job,) = manifest_of({"id": "a", "steps": 3}).jobs
    made = showing(folder)
    for done in (1, 2, 3):
        made.show([prepared(job)], {"a"}, done, torch.zeros(1, 12, 2, 4, 4))
    (warning,) = [record.message for record in caplog.records if "preview" in record.message]
    assert warning.startswith("a preview could not be written: ")
    assert not list(elsewhere.iterdir()) and not [*tmp_path.rglob(f"{PARTIAL}*")]
    assert folder.exists() == (obstacle != "gone"), "a run that was moved away is not made anew"


def killed_in_a_preview(run) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    write, count = previews.write_image, [0]

    def killed(path, frame: np.ndarray) -> None:
        count[0] += 1
        if count[0] == 3:
            (path.parent / f"{PARTIAL}123-{path.name}").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, frame)

    previews.write_image = killed
    worker.let_go()
    generate(manifest_of(*THREE).model_copy(update={"preview_every": 1}), run, LinearModel)


def test_a_kill_within_a_preview_costs_nothing(tmp_path):
    generate(manifest_of(*THREE), tmp_path / "whole", LinearModel)
    assert in_child(killed_in_a_preview, tmp_path / "run") == -signal.SIGKILL
    assert [*tmp_path.rglob(f"{PARTIAL}123*")]
    manifest = manifest_of(*THREE).model_copy(update={"preview_every": 1})
    generate(manifest, tmp_path / "run", LinearModel)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert not [*(tmp_path / "run").rglob(f"{PARTIAL}*")]
