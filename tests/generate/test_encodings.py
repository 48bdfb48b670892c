"""Prompts and inputs are encoded once, by content, for all runs; nothing damaged, foreign or changed is taken."""

import os
import stat
import threading

import pytest
import torch
from PIL import Image

from pusa.errors import MediaError, NotFiniteError
from pusa.generate.encodings import Encodings, encodings_folder, prune
from pusa.generate.ledger import InputHashes
from pusa.generate.sampling import prepare
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.video.media import read_frames, read_image
from pusa.weights.model import Model
from tests.helpers.stub_model import TINY, StubModel, TextFeatures


class Counts(StubModel):
    """Counts what it encodes; another `scale` stands for other weights."""

    def __init__(self, scale=1.0):
        super().__init__(TINY)
        self.scale, self.texts, self.inputs = scale, [], 0

    def fingerprints(self, *parts):
        return {part: f"{part} {self.scale}" for part in parts}

    def encode_text(self, prompts, padded=True):
        self.texts += prompts
        value = float("nan") if prompts == ["nan"] else self.scale * len(prompts[0])
        return TextFeatures(torch.full((1, 3, 4), value), torch.tensor([[True, False, True]]))

    def encode(self, frames_THWC):
        self.inputs += 1
        return super().encode(frames_THWC) * self.scale


def condition_of(task="image_to_video", **keys):
    size = {"id": "a", "task": task, "width": 32, "height": 32, "num_frames": 13, **keys}
    job = job_of(size)
    return job.conditions()[0], job


def job_of(settings):
    (job,) = GenerateManifest.model_validate({"model": TINY, "jobs": [settings]}).jobs
    return job


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), (200, 10, 30)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def test_a_prompt_is_encoded_once_for_all_runs_and_blank_ones_are_one(tmp_path):
    for made in (["a ball", ""], []):
        model = Counts()
        encodings = Encodings(model, tmp_path / "cache/encodings")
        for _ in range(2):
            for prompt in ("a ball", "", " \n"):
                text = encodings.text(prompt)
                assert text.features.unique().tolist() == [len(prompt.strip())]
                assert text.mask.dtype == torch.bool and text.mask.tolist() == [[True, False, True]]
        assert model.texts == made
    folder = tmp_path / "cache/encodings"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(files(folder)) == 2
    other = Counts(scale=2.0)
    assert Encodings(other, folder).text("a ball").features.unique().tolist() == [12] and other.texts == ["a ball"]
    other.dtype = torch.bfloat16
    Encodings(other, folder).text("a ball")
    assert other.texts == ["a ball"] * 2


class Pools(Counts):
    """Also gives pooled features; those of "bad" are not finite."""

    def encode_text(self, prompts, padded=True):
        text = super().encode_text(prompts)
        pooled = torch.full((1, 5), float("nan") if prompts == ["bad"] else len(prompts[0]) / 7)
        return TextFeatures(text.features, text.mask, pooled)


def test_pooled_features_are_kept_too(tmp_path):
    folder = tmp_path / "encodings"
    for texts in (["a ball"], []):
        model = Pools()
        text = Encodings(model, folder).text("a ball")
        assert torch.equal(text.pooled, torch.full((1, 5), 6 / 7)) and model.texts == texts
    assert Encodings(Counts(scale=3.0), folder).text("a ball").pooled is None
    job = job_of({"id": "a", "task": "text_to_video", "prompt": "bad", "guidance": 1})
    with pytest.raises(NotFiniteError, match="the pooled text features of prompt"):
        prepare(job, Pools(), Encodings(Pools(), folder), InputHashes())
    assert len(files(folder)) == 2  # what is not finite is not kept


def test_an_input_is_known_by_its_content_and_by_all_that_chooses_and_fits_its_frames(tmp_path, picture, drawn):
    model, hashes = Counts(), InputHashes()

    def made(source, task="image_to_video", **keys):
        before = model.inputs
        key = "image" if task == "image_to_video" else "video"
        Encodings(model, tmp_path / "encodings").given(*condition_of(task, **{key: source}, **keys), hashes)
        return model.inputs - before

    assert made(picture) and not made(picture)
    picture.rename(tmp_path / "b.png")
    assert not made(tmp_path / "b.png", prompt="other", position=1, seed=4)
    assert [made(tmp_path / "b.png", **keys) for keys in ({"width": 64}, {"fit": "pad"}, {"background": "red"})] == [
        1
    ] * 3
    Image.new("RGB", (40, 30), (200, 10, 31)).save(tmp_path / "b.png")
    assert made(tmp_path / "b.png")
    clip = drawn / "media/ball.mp4"
    assert made(clip, "extension", given=[0, 1]) and not made(clip, "extension", given=[0, 1], guidance=2)
    assert made(clip, "extension", given=[0, 1], first_frame=3) and made(clip, "extension", given=[0, 1], fps=12)


def test_the_dtype_of_the_vae_is_part_of_the_keys_of_inputs_and_not_of_prompts(tmp_path, picture):
    made = []
    for vae_dtype in (None, "float32", "bfloat16", "bfloat16"):  # the first two are the same on a CPU
        model = Counts()
        model.spec = model.spec.model_copy(update={"vae_dtype": vae_dtype})
        encodings = Encodings(model, tmp_path / "encodings")
        encodings.text("a ball")
        encodings.given(*condition_of("image_to_video", image=picture), InputHashes())
        made.append((len(model.texts), model.inputs))
    assert made == [(1, 1), (0, 0), (0, 1), (0, 0)]


def test_the_tiny_models_encodings_come_back_with_the_same_bits(tmp_path, drawn):
    spec = ModelSpec(weights="builtin:tiny")
    model, prompt, clip = Model(spec, "cpu"), "a red ball", drawn / "media/ball.mp4"
    picture = drawn / "media/ball-first.png"
    for _ in range(2):
        encodings = Encodings(model, tmp_path / "encodings")
        text, expected = encodings.text(prompt), model.encode_text([prompt])
        assert torch.equal(text.features, expected.features) and torch.equal(text.mask, expected.mask)
        given = encodings.given(*condition_of(image=picture, width=64, height=64), InputHashes())
        assert torch.equal(given, model.encode(read_image(picture, "black")))
        given = encodings.given(
            *condition_of("extension", video=clip, given=[0, 1], width=64, height=64), InputHashes()
        )
        assert torch.equal(given, model.encode(read_frames(clip, range(7))))
    assert len(files(tmp_path / "encodings")) == 3


@pytest.mark.parametrize("case", ["flipped", "torn", "of another key", "a folder", "text"])
def test_a_damaged_file_is_made_again(tmp_path, caplog, case):
    folder = tmp_path / "encodings"
    Encodings(Counts(), folder).text("a")
    (path,) = files(folder)
    whole = path.read_bytes()
    if case == "a folder":
        path.unlink()
        path.mkdir()
    elif case == "of another key":
        Encodings(Counts(), folder).text("another")
        next(other for other in files(folder) if other != path).rename(path)
    else:
        changed = {"flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "torn": whole[:-3], "text": b"{}"}
        path.write_bytes(changed[case])
    model = Counts()
    assert Encodings(model, folder).text("a").features.unique().tolist() == [1] and model.texts == ["a"]
    assert case == "a folder" or (path.read_bytes() == whole and "an encoding is made again" in caplog.text)


def test_values_that_are_not_finite_are_not_kept_on_disk(tmp_path):
    encodings = Encodings(Counts(), tmp_path / "encodings")
    assert encodings.text("nan").features.isnan().all() and files(tmp_path / "encodings") == []


def test_what_was_encoded_in_tiles_for_want_of_memory_is_not_kept_on_disk(tmp_path, picture, monkeypatch):
    model = Model(ModelSpec(weights="builtin:tiny"), "cpu")
    posterior = model.posterior

    def lacks_memory(frames_BTHWC, tile=0):
        if not tile:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return posterior(frames_BTHWC, tile)

    condition = condition_of(image=picture, width=96, height=96)
    with monkeypatch.context() as patched:
        patched.setattr(model, "posterior", lacks_memory)
        encodings = Encodings(model, tmp_path / "encodings")
        tiled = encodings.given(*condition, InputHashes())
        assert encodings.given(*condition, InputHashes()) is tiled and files(tmp_path / "encodings") == []
    model = Model(ModelSpec(weights="builtin:tiny"), "cpu")
    whole = Encodings(model, tmp_path / "encodings").given(*condition, InputHashes())
    assert not torch.equal(whole, tiled) and len(files(tmp_path / "encodings")) == 1


@pytest.mark.parametrize("moment", ["before it is read", "while it is read"])
def test_a_file_that_changes_is_never_kept_under_the_hash_of_the_one_before(tmp_path, picture, monkeypatch, moment):
    times, condition = picture.stat(), condition_of(image=picture)

    class Swaps(Counts):
        """Another picture, of equal size and times, takes the place of the one that is encoded."""

        swaps = True

        def encode(self, frames_THWC):
            if self.swaps and moment == "while it is read":
                swap()
            return super().encode(frames_THWC)

    def swap():
        Image.new("RGB", (40, 30), (10, 200, 30)).save(picture)
        os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))

    model, hashes = Swaps(), InputHashes()
    encodings = Encodings(model, tmp_path / "encodings")
    old = hashes.hash_of(picture)
    if moment == "before it is read":
        swap()
        green = encodings.given(*condition, hashes)
        assert hashes.hash_of(picture) != old
    else:
        with pytest.raises(MediaError, match="was changed while it was read; run again"):
            encodings.given(*condition, hashes)
        assert files(tmp_path / "encodings") == []
        model.swaps = False
        green = encodings.given(*condition, hashes)
    assert green.unique().tolist() == pytest.approx([240 / 3 / 255])
    picture.unlink()
    with pytest.raises(MediaError, match=r"a\.png cannot be read: No such file"):
        encodings.given(*condition, hashes)


def unusable(case, tmp_path, monkeypatch):
    folder = tmp_path / "encodings"
    if case == "writable by others":
        folder.mkdir()
        folder.chmod(0o777)
    elif case == "of another user":
        folder.mkdir(mode=0o700)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    elif case == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif case == "a file":
        folder.write_text("")
    else:
        return tmp_path / ("x" * 300)
    return folder


@pytest.mark.parametrize("case", ["writable by others", "of another user", "a link", "a file", "too long a name"])
def test_a_folder_that_cannot_be_trusted_is_not_used(tmp_path, monkeypatch, caplog, case):
    model, folder = Counts(), unusable(case, tmp_path, monkeypatch)
    encodings = Encodings(model, folder)
    assert encodings.text("a").features is encodings.text("a").features and model.texts == ["a"]
    prune(folder)
    assert caplog.text.count("encodings are kept in memory only") == len(caplog.records) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_costs_one_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    model = Counts()
    Encodings(Counts(), tmp_path / "encodings").text("kept")
    monkeypatch.setattr("pusa.generate.encodings.save_verified", refuse)
    encodings = Encodings(model, tmp_path / "encodings")
    for prompt in ("a", "b", "a", "kept"):
        assert encodings.text(prompt).features.unique().tolist() == [len(prompt)]
    assert model.texts == ["a", "b"] and caplog.text.count("No space left") == len(caplog.records) == 1


def test_processes_share_a_folder(tmp_path):
    models = [Counts() for _ in range(8)]
    start, wrong = threading.Barrier(len(models)), []

    def work(model):
        encodings = Encodings(model, tmp_path / "encodings")
        start.wait()
        for length in range(1, 20):
            if encodings.text("x" * length).features.unique().tolist() != [length]:
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(list((tmp_path / "encodings").iterdir())) == 19
    late = Counts()
    assert Encodings(late, tmp_path / "encodings").text("x").mask.any() and not late.texts


def test_what_was_not_used_for_the_longest_time_is_removed_but_nothing_of_the_last_hour(tmp_path):
    folder, now = tmp_path / "encodings", 1e9
    encodings = Encodings(Counts(), folder)
    paths = []
    for hours, prompt in enumerate(["a", "b", "c", "d"]):
        encodings.text(prompt)
        (new,) = set(files(folder)) - set(paths)
        paths.append(new)
        os.utime(new, (now - 3600 * (4 - hours) + 60,) * 2)
    (folder / "notes.txt").write_text("x" * 10_000)
    (folder / ".partial-0-x.safetensors").write_text("x")
    os.utime(folder / ".partial-0-x.safetensors", (0, 0))
    size = paths[0].stat().st_size
    prune(folder, 4 * size, now)
    assert files(folder) == sorted(paths)  # but for the unfinished file
    Encodings(Counts(), folder).text("a")  # used now
    assert paths[0].stat().st_mtime > now
    prune(folder, 3 * size, now)
    assert files(folder) == sorted({*paths} - {paths[1]})
    prune(folder, 0, now)
    assert files(folder) == sorted([paths[0], paths[3]]) and (folder / "notes.txt").exists()
    prune(None)
    prune(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_process_keeps_only_so_much_in_memory(monkeypatch):
    model = Counts()
    encodings = Encodings(model, None)
    monkeypatch.setattr("pusa.generate.encodings.MEMORY", 3 * (12 + 3) * 4)
    for prompt in ("a", "b", "c", "a", "d", "a", "b"):
        encodings.text(prompt)
    assert model.texts == ["a", "b", "c", "d", "b"]


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert encodings_folder() is None  # tests switch it off
    monkeypatch.delenv("PUSA_CACHE")
    assert encodings_folder() == tmp_path / ".cache/pusa/encodings"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert encodings_folder() == tmp_path / ".cache/pusa/encodings"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert encodings_folder() == tmp_path / "x/pusa/encodings"
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "own"))
    assert encodings_folder() == tmp_path / "own/encodings"
