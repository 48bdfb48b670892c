"""A video is decoded and written piece by piece, within the memory there is; each frame reaches ffmpeg once."""

import errno
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from pusa.errors import NoMemoryError, NotFiniteError
from pusa.generate.decode import decode_chunks, decode_job, write_job_video
from pusa.system.files import sha256_file
from pusa.video.media import VideoWriter, read_frames, write_video
from tests.helpers.stub_model import TINY, StubBackbone, StubModel, manifest_of


class Alive:
    """Counts chunks, and the most that were in memory when one was added."""

    def __init__(self):
        self.chunks, self.most = [], 0

    def add(self, chunk):
        self.chunks.append(weakref.ref(chunk))
        self.most = max(self.most, sum(chunk() is not None for chunk in self.chunks))


class Pieces(StubBackbone):
    """Decodes to one level for each frame, its number; `fail(at_once, tile, start)` may raise an error."""

    def __init__(self, at_once=2, fail=lambda at_once, tile, start: None):
        self.at_once, self.fail, self.calls, self.alive = at_once, fail, [], Alive()

    def frames_at_once(self, z_BCFhw):
        return min(self.at_once, z_BCFhw.shape[2])

    def decode_video(self, vae, z_BCFhw, at_once=None, tile=0):
        self.calls.append((at_once, tile))
        height, width = (side * self.geometry.spatial for side in z_BCFhw.shape[-2:])
        for start in range(0, z_BCFhw.shape[2], at_once):
            self.fail(at_once, tile, start)
            end = min(start + at_once, z_BCFhw.shape[2])
            frames = torch.arange(self.geometry.num_frames(start) if start else 0, self.geometry.num_frames(end))
            x_BCTHW = (frames / 127.5 - 1).view(1, 1, -1, 1, 1).expand(1, 3, -1, height, width).clone()
            self.alive.add(x_BCTHW)
            yield x_BCTHW


class PiecesModel(StubModel):
    """Decodes by `Pieces`."""

    def __init__(self, backbone):
        super().__init__(TINY)
        self.backbone, self.alive = backbone, Alive()

    def decode_chunks(self, z_CFhw):
        for frames in self._decoder.decode(z_CFhw):
            self.alive.add(frames)
            yield frames


def job_of(**keys):
    (job,) = manifest_of({"id": "a", **keys}).jobs
    return job


def latents(frames=40):
    return torch.zeros(12, frames, 4, 4)


def levels(frames_THWC):
    return frames_THWC[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("task", ["text_to_video", "loop"])
def test_no_part_of_a_long_video_is_kept(tmp_path, task):
    model, path = PiecesModel(Pieces()), tmp_path / "a.mp4"
    job = job_of(task=task, num_frames=115)
    facts = write_job_video(job, model, latents(20), path)()
    for alive in (model.backbone.alive, model.alive):
        assert len(alive.chunks) == (20 if task == "loop" else 10) and alive.most <= 2
    assert facts["video_sha256"] == sha256_file(path) and "warning" not in facts
    shown = read_frames(path, range(120 if task == "loop" else 115))
    expected = np.roll(range(115, 235), -3) if task == "loop" else np.arange(115)
    assert np.abs(shown[:, 8, 8, 0] - expected.astype(int)).max() < 4


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("at_once", [1, 2, 3, 10])
def test_a_loop_is_the_second_round_and_begins_in_the_middle_of_a_latent_frame(frames, at_once):
    model = PiecesModel(Pieces(at_once))
    twice = model.decode(torch.cat([latents(frames)] * 2, 1))
    expected = np.roll(levels(twice)[-6 * frames :], -3).tolist()
    assert levels(PiecesModel(Pieces(at_once)).decode_ring(latents(frames))) == expected


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_exact_puts_pixels_back_in_any_chunk(tmp_path, at_once):
    Image.new("RGB", (32, 32), (200, 100, 50)).save(tmp_path / "a.png")
    job = job_of(task="image_to_video", image=tmp_path / "a.png", position=2, num_frames=37, preset="exact", exact=True)
    video = decode_job(job, PiecesModel(Pieces(at_once)), latents(7))
    expected = np.arange(37)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    expected[7:13] = (200, 100, 50)
    assert np.array_equal(video, expected)


ERRORS = {
    "gpu": partial(torch.OutOfMemoryError, "CUDA out of memory"),
    "cpu": partial(RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "python": MemoryError,
}


def fails_above(at_once, tile=0, start=0, error=ERRORS["gpu"]):
    """Return what runs out of memory with more latent frames at once or a larger tile, from latent frame `start` on."""

    def fail(frames, side, first):
        if first >= start and (frames > at_once or (tile and (side or 1000) > tile)):
            raise error()

    return fail


@pytest.mark.parametrize(("error", "start"), [*zip(ERRORS.values(), (0, 16, 16), strict=True)], ids=ERRORS.keys())
def test_with_less_memory_fewer_latent_frames_are_decoded_at_a_time_and_no_frame_comes_twice(error, start, caplog):
    model = PiecesModel(Pieces(8, fails_above(2, start=start, error=error)))
    assert levels(model.decode(latents())) == list(range(235))  # 40 latent frames
    assert model.backbone.calls == [(8, 0), (4, 0), (2, 0)] and len(caplog.records) == 2
    assert model.backbone.alive.most <= 2
    model.decode(latents(3))
    assert model.backbone.calls[3:] == [(2, 0)], "what worked is kept"


def test_at_last_tiles_are_used_and_the_facts_say_so(tmp_path):
    model = PiecesModel(Pieces(2, fails_above(2, tile=64, start=6)))
    z_CFhw = torch.zeros(12, 10, 16, 16)
    facts = write_job_video(job_of(width=128, height=128), model, z_CFhw, tmp_path / "a.mp4")()
    assert model.backbone.calls == [(2, 0), (1, 0), (1, 64)]
    assert facts["warning"] == "memory sufficed only for tiles of 64 pixels, whose borders may show"
    assert len(read_frames(tmp_path / "a.mp4", range(55))) == 55


def test_what_fits_in_no_way_fails_with_a_sentence_and_leaves_no_file(tmp_path):
    model = PiecesModel(Pieces(2, fails_above(0)))
    with pytest.raises(
        NoMemoryError, match="one latent frame of 128x128 does not fit in memory, not even in tiles of 64"
    ):
        write_job_video(job_of(), model, torch.zeros(12, 10, 16, 16), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


class Recorded(VideoWriter):
    """Keeps its ffmpeg in sight."""

    process = property(lambda self: self._process)


def test_an_error_while_a_video_is_decoded_ends_ffmpeg_and_removes_the_file(tmp_path, monkeypatch):
    writers = []

    def record(*args):
        writers.append(Recorded(*args))
        return writers[-1]

    def fail(at_once, tile, start):
        if start == 4:
            raise NotFiniteError("no number")

    monkeypatch.setattr("pusa.generate.decode.VideoWriter", record)
    with pytest.raises(NotFiniteError):
        write_job_video(job_of(), PiecesModel(Pieces(fail=fail)), latents(), tmp_path / "a.mp4")
    assert writers[0].process.returncode and not list(tmp_path.iterdir())
    # And if nobody waits for the end of a video.
    write_job_video(job_of(), PiecesModel(Pieces()), latents(), tmp_path / "b.mp4")
    process = writers[1].process
    assert process.poll() is None
    writers.clear()
    assert process.returncode == -9


def test_a_full_disk_is_told_from_other_errors(tmp_path):
    (tmp_path / "a.mp4").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as full:
        write_job_video(job_of(), PiecesModel(Pieces()), latents(), tmp_path / "a.mp4")()
    assert full.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"ffmpeg: .*(height|width) not divisible by 2") as odd:
        write_video(tmp_path / "b.mp4", np.zeros((3, 31, 31, 3), np.uint8), 24)
    assert odd.value.errno is None and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="there is no frame"):
        write_video(tmp_path / "b.mp4", [], 24)


def test_chunks_and_an_array_give_the_same_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames, 24)
    write_video(tmp_path / "b.mp4", iter(np.split(frames.transpose(0, 2, 1, 3), [1, 2, 20])), 24)
    write_video(tmp_path / "c.mp4", np.ascontiguousarray(frames.transpose(0, 2, 1, 3)), 24)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert b == c != a


def test_a_job_that_is_dropped_while_it_is_decoded_leaves_the_decoder_as_it_was():
    model = PiecesModel(Pieces())
    chunks = decode_chunks(job_of(), model, latents())
    next(chunks)
    del chunks
    assert levels(model.decode(latents())) == list(range(235))
