import pytest
from huggingface_hub import constants

from pusa.errors import ManifestError
from pusa.ingest.hub import fetch_dataset
from pusa.ingest.sources import find_sources
from pusa.manifest.models import IngestManifest

REPO = "datasets/a/clips"
NAME = "hf:a/clips"
FILES = {
    "in/a.mp4": b"video",
    "in/a.txt": b"a caption",
    "B.MOV": b"another",
    "README.md": b"not a source",
    "x.zip": b"big",
}


@pytest.fixture
def hub(empty_hub):
    empty_hub.add(REPO, FILES)
    return empty_hub


def downloaded(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_videos_and_captions_are_downloaded_and_only_once(hub, capfd):
    folder = fetch_dataset(NAME)
    assert downloaded(folder) == {"in/a.mp4", "in/a.txt", "B.MOV"}
    assert fetch_dataset(NAME) == folder and len(hub.sent) == 3
    assert capfd.readouterr().err == "", "a progress bar is drawn only on a terminal"


def test_a_data_set_is_a_source(hub):
    hub.add(REPO, {**FILES, "metadata.csv": b"file_name,text\nin/a.mp4,one\n"}, "v2")
    plain, listed = (find_sources(IngestManifest(source=name)) for name in (NAME, f"{NAME}@v2"))
    assert [(plain.name(s), s.caption) for s in plain.sources] == [("B.MOV", None), ("in/a.mp4", "a caption")]
    assert [(listed.name(s), s.caption, s.caption_from) for s in listed.sources] == [
        ("in/a.mp4", "one", "metadata.csv:2")
    ]


def test_a_data_set_cannot_name_other_files_of_this_machine(hub):
    names = ["/etc/passwd.mp4", "../up.mp4", "in/../../up.mp4", "in/../B.MOV", "in/a.mp4"]
    hub.add(REPO, {**FILES, "metadata.csv": "\n".join(["file_name,text", *(f"{n},one" for n in names)]).encode()}, "v3")
    catalogue = find_sources(IngestManifest(source=f"{NAME}@v3"))
    assert [catalogue.name(s) if s.reject is None else s.reject.reason for s in catalogue.sources] == [
        "bad_row", "bad_row", "bad_row", "B.MOV", "in/a.mp4"
    ]  # fmt: skip
    assert "/etc/passwd.mp4" in catalogue.sources[0].reject.detail


def test_a_broken_download_resumes_and_offline_only_a_complete_one_is_used(hub, monkeypatch):
    hub.refused[REPO] = (410, None, "Gone")  # not transient, so it is not tried again
    with pytest.raises(ManifestError, match=f"^{NAME}: .*run the same command again"):
        fetch_dataset(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ManifestError,
        match=f"^{NAME}: .* no finished download. Also, HF_HUB_OFFLINE=1 forbids",
    ):
        fetch_dataset(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.refused.clear()
    folder = fetch_dataset(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_dataset(NAME) == folder


def test_the_cache_is_used_if_the_hub_cannot_be_reached(hub):
    folder = fetch_dataset(NAME)
    hub.down[REPO] = (503, None, "Busy")
    assert fetch_dataset(NAME) == folder
    hub.down[REPO] = (403, "GatedRepo", "Not in the authorized list")
    with pytest.raises(ManifestError, match=f"ask for access at {hub.url}/{REPO}, then give your token"):
        fetch_dataset(NAME)


def test_a_name_that_is_not_a_data_set_is_an_error(hub):
    with pytest.raises(ManifestError, match=r"hf:a/nothing: .* has no such repository"):
        fetch_dataset("hf:a/nothing")
    with pytest.raises(ManifestError, match="has no revision 'v9'"):
        fetch_dataset(f"{NAME}@v9")
    with pytest.raises(ManifestError, match="names one file; expected a data set: hf:ORG"):
        fetch_dataset(f"{NAME}:in/a.mp4")
    with pytest.raises(ManifestError, match="'hf:clips' is not a valid name on a model hub"):
        fetch_dataset("hf:clips")
