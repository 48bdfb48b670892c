"""Whatever a hub answers, the outcome is a file with the listed hash below the cache, or a sentence."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pusa.errors import ManifestError, WeightsError
from pusa.ingest.hub import fetch_dataset
from pusa.weights import repository
from pusa.weights.hub import HubName, choose_files, fetch_file
from pusa.weights.repository import Listing, path_fault
from tests.fuzz import examples
from tests.weights.conftest import empty_hub

__all__ = ["empty_hub"]

SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture
def hub(empty_hub, monkeypatch):
    """An empty hub; between attempts nobody waits."""
    monkeypatch.setattr(repository, "_LONGEST_WAIT", 0.0)
    return empty_hub


TRICKY = ["..", ".", "", "/", "\\", "\0", "\x1b[2J", "\ud800", "x" * 256, "in", "a.mp4", "a.txt", "dit.safetensors"]
PATHS = st.lists(st.sampled_from(TRICKY) | st.text(max_size=4), max_size=5).map("/".join) | st.text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["0" * 40, "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sha256", "oid"]), inner, max_size=2),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries({}, optional=dict.fromkeys(["size", "lfs", "blobId", "oid", "type"], VALUES))
KEYS = st.sampled_from(["sha", "siblings", "rfilename", "path", "size", "lfs", "type", "sha256", "oid", "blobId"])
JSON = st.recursive(VALUES | PATHS, lambda i: st.lists(i, max_size=4) | st.dictionaries(KEYS, i, max_size=6))
HEADERS = st.sampled_from(
    [
        "Location",
        "Content-Length",
        "Content-Range",
        "Content-Encoding",
        "Transfer-Encoding",
        "Link",
        "ETag",
        "Retry-After",
    ]
)
LINES = st.lists(st.tuples(HEADERS, st.binary(max_size=20) | PATHS.map(lambda p: p.encode("utf-8", "replace"))))
PARTS = ["transformer", "vae", "tokenizer", "config.json"]


@settings(deadline=None, max_examples=examples(100))
@given(PATHS, ENTRIES)
@example("a\x85b", {})
def test_a_checked_file_lies_below_the_folder_of_its_repository(path, entry):
    folder = Path("/cache/snapshots/0")
    with contextlib.suppress(WeightsError):
        (file,) = Listing("0" * 40, {path: entry}).check([path])
        assert folder in (folder / file.path).parents and (folder / file.path).resolve() == folder / file.path
        assert file.size is None or 0 <= file.size < 1 << 63
        assert file.hash is None or len(bytes.fromhex(file.hash)) in (20, 32)
        assert path_fault(file.path) is None


@settings(deadline=None, max_examples=examples(100))
@given(st.text() | PATHS.map("hf:a/b:".__add__) | PATHS.map("hf:a/b@".__add__), st.lists(PATHS, max_size=30))
def test_names_and_lists_of_files_end_in_a_choice_or_a_sentence(text, files):
    with contextlib.suppress(WeightsError):
        name = HubName.parse(text)
        assert str(name) == text and not (name.file and path_fault(name.file))
    try:
        assert set(choose_files(files, PARTS)) <= set(files)
    except WeightsError as error:
        assert str(error).isprintable()


def outcomes(hub, cache):
    """Fetch from a hub; whatever happens must be a sentence, and no file may lie there that was not checked."""
    for fetch in (lambda: fetch_file(HubName("a/b", None, "a.txt")), lambda: fetch_dataset("hf:a/b")):
        with contextlib.suppress(WeightsError, ManifestError):
            fetch()
    assert {path.name for path in cache.parent.iterdir()} <= {"hub", "cache"}
    assert not list(cache.rglob("*.incomplete"))
    shutil.rmtree(cache, ignore_errors=True)


@settings(deadline=None, max_examples=examples(25), suppress_health_check=SHARED)
@given(JSON, JSON)
def test_any_json_of_a_hub_ends_in_a_file_or_a_sentence(hub, tmp_path, info, tree):
    def answer(value):
        body = json.dumps(value).encode()
        return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body]

    known = {"sha": "0" * 40, "siblings": info}
    infos = answer(known if isinstance(info, list) else info)
    hub.raw = {"blobs=true": infos, "expand=sha": answer(known), "recursive=true": answer(tree)}
    hub.raw |= {"a.txt": [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]}
    outcomes(hub, Path(constants.HF_HUB_CACHE))


@settings(deadline=None, max_examples=examples(25), suppress_health_check=SHARED)
@given(st.sampled_from([200, 200, 206, 302, 404, 429, 503]) | st.integers(0, 999), LINES, st.binary(), st.booleans())
@example(302, [("Location", b"http://\xff")], b"", True)
@example(200, [("Content-Length", b"99999999999999999999999")], b"", True)
def test_any_head_of_an_answer_ends_in_a_file_or_a_sentence(hub, tmp_path, status, lines, body, listed):
    head = b"HTTP/1.1 %d X\r\n" % status + b"".join(b"%s: %s\r\n" % (name.encode(), value) for name, value in lines)
    file = [{"rfilename": "a.txt", "path": "a.txt", "size": len(body), "blobId": None}]
    good = json.dumps({"sha": "0" * 40, "siblings": file}).encode()
    with_pages = {"blobs=true": good, "expand=sha": good, "recursive=true": json.dumps(file).encode()}
    hub.raw = {"a.txt": [head + b"\r\n", body]}
    for end, data in with_pages.items():
        hub.raw[end] = [b"HTTP/1.1 200 OK\r\n\r\n", data] if listed else [head + b"\r\n", body]
    outcomes(hub, Path(constants.HF_HUB_CACHE))
