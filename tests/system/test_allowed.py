"""A worker that allows some folders reads and writes nothing outside them, whatever a manifest or a link names."""

import os
from pathlib import Path

import pytest

from pusa.errors import ManifestError, Rejected
from pusa.finetune.recipe import with_overrides
from pusa.ingest.sources import find_sources
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import FinetuneManifest, IngestManifest
from pusa.system import allowed as module
from pusa.system.allowed import VARIABLE, Allowed
from pusa.video.ffmpeg import open_regular_file
from pusa.weights.source import BASE_KEY, find_part

MODEL = 'model: {weights: "builtin:tiny"}'
PICTURE = f"kind: generate\n{MODEL}\njobs: [{{id: a, task: image_to_video, image: %s}}]\n"
TEXT = f"kind: generate\n{MODEL}\njobs: [{{id: a, task: text_to_video, prompt_file: %s}}]\n"


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Return the only folder that is allowed. Beside it is outside/ with a picture, a caption and an empty folder."""
    for name in ("data/in", "outside/empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("outside/secret.png", "outside/secret.txt", "data/in/a.png", "data/in/a.txt"):
        (tmp_path / name).write_text("words")
    (tmp_path / "data2").symlink_to("outside")  # its name begins as that of the allowed folder
    monkeypatch.setenv(VARIABLE, f"{tmp_path / 'data'}{os.pathsep}")
    return tmp_path / "data"


def load(data: Path, text: str):
    (data / "m.yaml").write_text(text)
    return load_manifest(data / "m.yaml", data / "run")


def refusal(data: Path, text: str) -> list[str]:
    """Return the lines of the refusal, each of which names what is allowed."""
    with pytest.raises(ManifestError) as error:
        load(data, text)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert all(line.endswith(f"outside the folders that this worker allows: '{data}'") for line in lines), lines
    return lines


def test_paths_inside_are_used_and_names_are_no_paths(data):
    for path in ("in/a.png", data / "in/a.png", "in/../in/a.png", "../data/in/a.png", "RUN/videos/x.mp4"):
        assert load(data, PICTURE % path).jobs
    (data / "link.png").symlink_to("in/a.png")
    assert load(data, PICTURE % "link.png").jobs
    assert load(data, PICTURE % "'in/*.png, prompt_file: in/*.txt'".strip("'")).jobs[0].prompt == "words"
    text = "kind: ingest\nsource: 'hf:some/data'\n"
    assert load(data, text).source == "hf:some/data"


OUTSIDE = ["../outside/secret.png", "../data2/secret.png", "in/../../outside/secret.png", "/etc/hostname"]
OUTSIDE += ["RUN/../../outside/secret.png", "link.png", "folder/secret.png", "folder/../secret.png", "none/../../none"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leads_outside_is_refused(data, path):
    (data / "link.png").symlink_to("../outside/secret.png")
    (data / "folder").symlink_to(data.parent / "outside/empty/..")
    (line,) = refusal(data, PICTURE % path)
    assert line.startswith("jobs.0.image: ")
    (line,) = refusal(data, TEXT % path)
    assert line.startswith("jobs.0.prompt_file: ")
    (line,) = refusal(data, f"kind: finetune\nbase: {{weights: '{path}'}}\n")
    assert line.startswith("base.weights: ")
    (line,) = refusal(data, f"kind: ingest\nsource: {path}\n")
    assert line.startswith("source: ")


GLOBS = ["../outside/*.png", "/etc/*", "*/secret.png", "**/*.png", "in/*/*.png", "in/*.png", "?n/../../outside/*.png"]


@pytest.mark.parametrize("pattern", GLOBS)
def test_a_glob_neither_lists_a_folder_outside_nor_matches_a_link_to_it(data, pattern):
    (data / "folder").symlink_to("../outside")
    (data / "in/folder").symlink_to("../../outside/empty")
    (data / "in/b.png").symlink_to("../../outside/secret.png")
    (line,) = refusal(data, PICTURE % f"'{pattern}'")
    assert line.startswith("jobs.0.image: ")


def test_what_the_file_system_has_by_another_unicode_form_is_checked_too(data):
    (data / "a\u0308.png").symlink_to("../outside/secret.png")  # is found for the other form of the name
    (line,) = refusal(data, PICTURE % "'\u00e4.png'")
    assert line.startswith("jobs.0.image: ")
    (line,) = refusal(data, TEXT % "'\u00e4.png'")
    assert line.startswith("jobs.0.prompt_file: ")


FOLDERS = {
    "kind: precompute\nclips: {}\n" + MODEL: "clips",
    'kind: finetune\nlatents: {}\nbase: {{weights: "builtin:tiny"}}': "latents",
    "kind: finetune\nbase: {{weights: {}}}": "base.weights",
    'kind: finetune\nbase: {{weights: "builtin:tiny", checkpoint: {}}}': "base.checkpoint",
    'kind: finetune\nbase: {{weights: "builtin:tiny", lora: {}}}': "base.lora",
    'kind: finetune\nbase: {{weights: "builtin:tiny", text_encoder: {}}}': "base.text_encoder",
}


@pytest.mark.parametrize("text, key", FOLDERS.items(), ids=FOLDERS.values())
def test_a_folder_with_a_link_that_leads_outside_is_refused(data, text, key):
    text = text.replace(MODEL, MODEL.replace("{", "{{").replace("}", "}}"))
    (data / "parts/deep").mkdir(parents=True)
    (data / "parts/deep/loop").symlink_to("..")
    assert load(data, text.format("parts"))
    (data / "parts/deep/weights.safetensors").symlink_to("../../../outside/secret.png")
    (line,) = refusal(data, text.format("parts"))
    assert line.startswith(f"{key}: {data}/parts/deep/weights.safetensors leads to {data.parent}/outside/secret.png")


def test_a_manifest_outside_is_not_read(data, tmp_path):
    (tmp_path / "outside/m.yaml").write_text("private: words")
    (data / "m.yaml").symlink_to("../outside/m.yaml")
    for path in (tmp_path / "outside/m.yaml", data / "m.yaml"):
        with pytest.raises(ManifestError, match="outside the folders") as error:
            load_manifest(path, data / "run")
        assert "private" not in str(error.value)


@pytest.mark.parametrize("name", ["../outside/run", "link", "link/run"])
def test_a_run_folder_outside_is_refused(data, name):
    (data / "m.yaml").write_text(PICTURE % "in/a.png")
    (data / "link").symlink_to("../outside")
    with pytest.raises(ManifestError, match="outside the folders"):
        load_manifest(data / "m.yaml", data / name)


@pytest.mark.parametrize("name", ["videos", "videos/.work", "checkpoints/last"])
def test_a_run_folder_with_a_link_that_leads_outside_is_refused_when_a_stage_begins_too(data, name):
    manifest = load(data, PICTURE % "in/a.png")
    (data / "run" / name).parent.mkdir(parents=True)
    (data / "run" / name).symlink_to(data.parent / "outside")
    with pytest.raises(ManifestError, match=f"{name} leads to .*/outside, which is outside the folders"):
        load(data, PICTURE % "in/a.png")
    with pytest.raises(ManifestError, match=f"{name} leads to .*/outside, which is outside the folders"):
        manifest.resolve_paths(data / "run")


def test_a_link_that_was_set_after_the_check_is_found_when_the_stage_begins(data):
    manifest = load(data, PICTURE % "in/a.png")
    assert manifest.resolve_paths(data / "run") == manifest
    (data / "in/a.png").unlink()
    (data / "in/a.png").symlink_to("../../outside/secret.png")
    with pytest.raises(ManifestError, match=r"jobs\.0\..*image: .*/in/a.png leads to .*outside the folders"):
        manifest.resolve_paths(data / "run")


@pytest.mark.parametrize("path", ["/etc", "../outside", "link", "RUN/../../outside"])
def test_an_override_of_the_latents_is_checked(data, path, monkeypatch):
    monkeypatch.chdir(data)
    (data / "link").symlink_to("../outside")
    manifest = load(data, 'kind: finetune\nbase: {weights: "builtin:tiny"}\n')
    assert isinstance(manifest, FinetuneManifest)
    assert with_overrides(manifest, {"latents": "in"}).resolve_paths(data / "run").latents == data / "in"
    with pytest.raises(ManifestError, match=r"latents: .* outside the folders"):
        with_overrides(manifest, {"latents": path}).resolve_paths(data / "run")


def test_sources_outside_are_not_opened(data, tmp_path):
    """Links in a folder of sources come from whoever fills it: each is a reject, and the others are used."""
    (data / "in/secret.mp4").symlink_to("../../outside/secret.png")
    (data / "in/good.mp4").write_text("film")
    (data / "in/good.txt").symlink_to("../../outside/secret.txt")
    (data / "in/folder").symlink_to("../../outside")
    sources = {source.path.name: source for source in find_sources(IngestManifest(source=str(data / "in"))).sources}
    assert str(sources["folder"].reject) == f"the folder cannot be read: {module.REFUSED}"
    assert str(sources["good.mp4"].reject) == f"{data}/in/good.txt cannot be read: {module.REFUSED}"
    assert not {"secret.png", "empty"} & sources.keys()
    for name in ("in/secret.mp4", "../outside/secret.png"):
        with pytest.raises(Rejected, match=module.REFUSED), open_regular_file(data / name):
            pytest.fail("it was opened")
    with open_regular_file(data / "in/good.mp4") as handle:
        assert os.read(handle, 9) == b"film"
    (data / "in/metadata.csv").symlink_to("../../outside/secret.txt")
    with pytest.raises(ManifestError, match=r"metadata.csv leads to .* outside the folders"):
        find_sources(IngestManifest(source=str(data / "in")))


def test_the_cache_of_the_hub_can_be_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "outside"))
    with open_regular_file(tmp_path / "outside/secret.png") as handle:
        assert os.read(handle, 9) == b"words"


def test_the_base_beside_a_model_is_checked(data):
    (data / "models/own").mkdir(parents=True)
    (data / "models/own/model_index.json").write_text(f'{{"{BASE_KEY}": "../base"}}')
    (data / "models/base").symlink_to("../../outside")
    with pytest.raises(ManifestError, match=r"models/base leads to .* outside the folders"):
        find_part(data / "models/own", "transformer")


def test_the_variable_is_a_list_of_absolute_folders(tmp_path):
    assert not Allowed.from_environment({})
    assert not Allowed.from_environment({VARIABLE: ""})
    assert Allowed.from_environment({VARIABLE: f"/a{os.pathsep}/b"}).folders == ("/a", "/b")
    assert Allowed.from_environment({VARIABLE: "/"}).allows("/etc/passwd")
    with pytest.raises(ManifestError, match=f"{VARIABLE} has 'runs'; expected absolute folders"):
        Allowed.from_environment({VARIABLE: f"/a{os.pathsep}runs"})
    (tmp_path / "link").symlink_to("real")
    assert Allowed([str(tmp_path / "link")]).allows(str(tmp_path / "real/x"))


def test_the_search_for_links_is_limited(data, monkeypatch):
    monkeypatch.setattr(module, "MAX_NAMES", 1)
    with pytest.raises(ManifestError, match="has more than 1 files, too many"):
        Allowed.from_environment().require_tree(data)
