"""A hub that lies or attacks is refused in a sentence, in bounded time and memory, and writes nothing but its cache."""

import gzip
import hashlib
import itertools
import json
import re
import threading
import tracemalloc

import pytest
from huggingface_hub import constants

from pusa.errors import ManifestError, PusaError, WeightsError
from pusa.ingest.hub import fetch_dataset
from pusa.weights import hub_client, repository
from pusa.weights.hub import HubName, fetch_file, fetch_parts
from pusa.weights.repository import Repository

MODEL, DATASET = "a/model", "datasets/a/clips"
FILES = {"config.json": b"{}", "dit.safetensors": b"weights" * 9, "in/a.mp4": b"video"}
CHUNK = b"10000\r\n" + bytes(1 << 16) + b"\r\n"  # of an answer in chunks
KINDS = pytest.mark.parametrize("kind", ["model", "dataset"])


@pytest.fixture
def hub(empty_hub, monkeypatch):
    """A hub with a small model and a small data set on it."""
    monkeypatch.setattr(repository, "_WAIT", 0.0)
    for repo in (MODEL, DATASET):
        empty_hub.add(repo, FILES)
    return empty_hub


def fetch(kind, file="dit.safetensors", revision=None):
    """Fetch a file of the model, or the clips."""
    return fetch_file(HubName("a/model", revision, file)) if kind == "model" else fetch_dataset("hf:a/clips")


def tree(folder):
    """Return the paths and bytes below a folder."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def refusal(kind, tmp_path, *args):
    """Return the message of a refusal, after which the cache has no file, and all else is as it was."""
    (tmp_path / "canary").write_text("alive")
    before = tree(tmp_path)
    with pytest.raises(WeightsError if kind == "model" else ManifestError) as caught:
        fetch(kind, *args)
    cache = tmp_path / "cache"
    after = {path: data for path, data in tree(tmp_path).items() if cache not in (path, *path.parents)}
    assert after == {path: data for path, data in before.items() if cache not in (path, *path.parents)}
    assert not [path for path in tree(cache) if path.is_file() and path.suffix != ".lock"]
    message = str(caught.value)
    assert len(message) < 1000 and message.isprintable(), "a server's text reaches the terminal raw"
    return message


def edit_listings(hub, edit):
    """Let the hub change the listings of both repositories."""
    hub.edits.update(dict.fromkeys((MODEL, DATASET), edit))


def edited(**changes):
    """Change the entries of a listing."""

    def edit(value):
        for entry in value if isinstance(value, list) else value["siblings"]:
            entry.update(changes)
        return value

    return edit


def named(name):
    """Add an entry like the first clip's, with another name."""
    entry = {"type": "file", "path": name, "rfilename": name, "size": 5}
    return lambda v: [*v, entry] if isinstance(v, list) else {**v, "siblings": [*v["siblings"], entry]}


BAD_NAMES = {
    "has '.', '..' or nothing between slashes": [
        *(
            "/abs.mp4",
            "../x.mp4",
            "in/../../x.mp4",
            "in/./x.mp4",
            "in//x.mp4",
            "..\\x.mp4",
            "\\\\host\\x.mp4",
            " /x.mp4",
        )
    ],
    "has a backslash or a control character": ["C:\\x.mp4", "x\0.mp4", "\x1b]0;x\x07.mp4", "x\n.mp4", "\x9b.mp4"],
    "is not text": ["\ud800.mp4"],
    "is longer than 1024 bytes, or 255 between slashes": [
        "x" * 256 + ".mp4",
        "in/" * 400 + "x.mp4",
        "é" * 127 + ".mp4",
    ],
}


@KINDS
def test_a_name_that_is_not_below_the_repository_is_refused(hub, tmp_path, kind):
    for fault, name in ((fault, name) for fault, names in BAD_NAMES.items() for name in names):
        edit_listings(hub, named(name))
        if kind == "dataset":
            assert fault in refusal(kind, tmp_path), name
        else:
            with pytest.raises(WeightsError, match=re.escape(fault)):
                Repository("a/model").list_files(None).check([name])
    if kind == "model":
        assert fetch(kind).read_bytes() == FILES["dit.safetensors"], "only the names of needed files matter"


@pytest.mark.parametrize("names", [("in", "in/a.mp4"), ("in/a.mp4", "in/a.mp4/b.mp4")])
def test_a_name_that_is_a_file_and_a_folder_is_refused(hub, tmp_path, names):
    hub.edits[DATASET] = named(names[0] if names[0] == "in" else names[1])
    assert f"lists '{names[0]}' as a file and as the folder of '{names[1]}'" in refusal("dataset", tmp_path)


def test_two_entries_of_one_name_are_refused(hub, tmp_path):
    hub.edits[DATASET] = named("in/a.mp4")
    assert "lists 'in/a.mp4' twice" in refusal("dataset", tmp_path)


@KINDS
def test_a_commit_of_another_form_is_refused(hub, tmp_path, kind):
    for commit in ("", "../../x", "/abs", "A" * 40, "a" * 39, "a" * 64, "\x1b[2J", None, 7, ["a"], "x" * 10**6):
        edit_listings(hub, lambda value, sha=commit: value if isinstance(value, list) else {**value, "sha": sha})
        assert "expected a git hash of 40 digits" in refusal(kind, tmp_path), commit


def test_another_commit_than_the_one_asked_for_is_refused(hub, tmp_path):
    hub.edits[MODEL] = lambda value: {**value, "sha": "0" * 40}
    assert "another commit, 000" in refusal("model", tmp_path, "config.json", hub.commits[MODEL, "main"])


@KINDS
def test_a_size_of_another_form_is_refused(hub, tmp_path, kind):
    for size in (-1, 1 << 63, 10**400, 1.5, True, "5", "\x1b[2J", [5], {}):
        edit_listings(hub, edited(size=size))
        assert "expected its bytes" in refusal(kind, tmp_path), size


@KINDS
def test_a_hash_of_another_form_is_refused(hub, tmp_path, kind):
    for lfs in ("x", 5, [], {}, {"sha256": "../x"}, {"sha256": "A" * 64}, {"sha256": None}, {"oid": 5}):
        edit_listings(hub, edited(lfs=lfs))
        assert "with the SHA-256 '" in refusal(kind, tmp_path), lfs
    edit_listings(hub, edited(lfs=None, oid="../../x", blobId="../../x"))
    assert "with the git hash '../../x', which is not one" in refusal(kind, tmp_path)


ANSWERS = [
    b"",
    b"<html>",
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b"9" * 5000,
    b"null",
    b"7",
    b'"x"',
    b"\xff",
    b"[1]",
    b'{"sha": 1',
]
SHAPES = [{"siblings": {}}, {"siblings": "x"}, {"siblings": [1]}, {"siblings": [{}]}, {"siblings": [{"rfilename": 5}]}]


def test_a_listing_of_another_shape_is_refused(hub, tmp_path):
    for answer in ANSWERS + [json.dumps({"sha": "a" * 40, **shape}).encode() for shape in SHAPES]:
        hub.raw["blobs=true"] = hub.raw["expand=sha"] = [b"HTTP/1.1 200 OK\r\n\r\n", answer]
        message = refusal("model", tmp_path)
        assert "does not answer as a model hub" in message or "not as the name of a file" in message, answer
        if b"siblings" not in answer:
            assert "does not answer as a model hub" in refusal("dataset", tmp_path), answer


def page(answer: bytes, place: bytes) -> list[bytes]:
    """Return a page of a list of files that names the next one."""
    link = b'Link: <%s>; rel="next"\r\nContent-Length: %d\r\n\r\n' % (place, len(answer))
    return [b"HTTP/1.1 200 OK\r\n" + link, answer]


def test_pages_of_another_shape_or_without_end_are_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "_MOST_FILES", 3)
    monkeypatch.setattr(repository, "_MOST_PAGES", 9)
    for answer in (b"{}", b"[1]", b'[{"path": "../a.mp4"}]', b'[{"path": null}]', b"[]"):
        hub.raw["recursive=true"] = hub.raw["cursor=7"] = page(answer, b"file:///etc/passwd?cursor=7")
        refusal("dataset", tmp_path)
    info = "/api/datasets/a/clips"
    assert {request.path for request in hub.requests} == {info, f"{info}/tree/{hub.commits[DATASET, 'main']}"}


def test_the_pages_of_a_large_data_set_are_joined(hub):
    first = b'[{"type": "directory", "path": "in"}]'
    hub.raw["recursive=true"] = page(first, b"http://other.invalid/x?cursor=a%2Bb")
    assert (fetch("dataset") / "in/a.mp4").read_bytes() == b"video"


def endless(head: bytes):
    return itertools.chain([b"HTTP/1.1 200 OK\r\n" + head + b"\r\n"], itertools.repeat(CHUNK))


@pytest.mark.parametrize("end", ["blobs=true", "/dit.safetensors"])
@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked\r\n", b"Content-Length: 9999999999999\r\n", b""])
def test_an_answer_without_end_is_cut_at_its_bound(hub, tmp_path, end, head):
    hub.raw[end] = endless(head)
    tracemalloc.start()
    assert "the hub sends more than the" in refusal("model", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * hub_client.LONGEST_JSON


@pytest.mark.parametrize("status", [b"404 Not Found", b"302 Found\r\nLocation: /api/models/a/model", b"302 Found"])
def test_the_bodies_of_refusals_and_redirects_are_not_read(hub, tmp_path, status):
    sent = []
    parts = itertools.chain([b"HTTP/1.1 " + status + b"\r\n\r\n"], itertools.repeat(bytes(1 << 20)))
    hub.raw["blobs=true"] = (sent.append(1) or part for part in parts)
    if b"Location" in status:
        assert fetch("model").read_bytes() == FILES["dit.safetensors"]
    else:
        refusal("model", tmp_path)
    assert len(sent) < 50


BOMB = gzip.compress(bytes(10 << 20))


@pytest.mark.parametrize("end", ["blobs=true", "/dit.safetensors"])
def test_a_compressed_answer_is_refused(hub, tmp_path, end):
    hub.raw[end] = [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB), BOMB]
    assert "which was not asked for" in refusal("model", tmp_path)


def test_a_redirect_that_leads_nowhere_is_refused(hub, tmp_path):
    places = {
        "file:///etc/passwd": "redirects to file://",
        "ftp://127.0.0.1/x": "redirects to ftp://",
        "gopher:x": "answered 302 Found",
        "": "redirects more than 10 times",
        "/x/resolve/main/dit.safetensors": "redirects more than 10 times",
        "http://[": "broke (",
        "http://\x1b[2J/": "answered 302 Found",
        "http://127.0.0.1:1/": "broke (",
    }
    for place, message in places.items():
        answer = f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()
        hub.raw["dit.safetensors"] = [answer]
        assert message in refusal("model", tmp_path), place


HEADERS = {
    "ETag": ['"/abs"', '"../../../x"', "", '"\x7f"', '"' + "x" * 9000 + '"'],
    "X-Linked-Etag": ['"../../../canary"', "/tmp/x"],
    "X-Repo-Commit": ["../../x", "", "x" * 9000],
    "X-Linked-Size": ["-1", "9" * 30],
    "X-Xet-Hash": ["0" * 64],
    "X-Xet-Cas-Url": ["http://127.0.0.1:1"],
    "Link": ['<http://127.0.0.1:1>; rel="xet-auth"'],
    "Set-Cookie": ["a=b; Domain=.com"],
    "Content-Disposition": ['attachment; filename="../../x"'],
}


@KINDS
def test_no_header_becomes_a_path_or_an_address(hub, tmp_path, kind):
    (tmp_path / "canary").write_text("alive")
    names = ("config.json", "dit.safetensors") if kind == "model" else ("in/a.mp4",)
    hashes = {hashlib.sha256(FILES[n]).hexdigest() if "dit" in n else git_hash(FILES[n]) for n in names}
    for number, values in enumerate(itertools.zip_longest(*HEADERS.values(), fillvalue="x")):
        with pytest.MonkeyPatch.context() as patched:
            cache = tmp_path / f"cache{number}"
            patched.setattr(constants, "HF_HUB_CACHE", str(cache))
            hub.headers = {**dict(zip(HEADERS, values, strict=True)), "X-Xet-Refresh-Route": "http://127.0.0.1:1"}
            for name in names:
                path = fetch(kind, name)
                assert (path if kind == "model" else path / name).read_bytes() == FILES[name]
        (found,) = cache.glob("*/blobs")
        assert {path.name for path in found.iterdir()} == hashes
    assert (tmp_path / "canary").read_text() == "alive"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def test_other_bytes_than_the_listed_hash_names_are_refused(hub, tmp_path):
    for name, data in itertools.product(["config.json", "dit.safetensors"], [b"[]", b"", b"weights" * 8 + b"weightz"]):
        hub.raw = {name: [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data), data]}
        message = refusal("model", tmp_path, name)
        expected = "arrived damaged" if len(data) == len(FILES[name]) else "ended early"
        assert expected in message or "sends more than the 2 bytes" in message, (name, data)


def test_a_size_that_is_not_listed_is_bounded_by_the_answer(hub, tmp_path):
    hub.edits[MODEL] = edited(size=None)
    hub.raw["dit.safetensors"] = endless(b"Transfer-Encoding: chunked\r\n")
    assert "does not say how large dit.safetensors is" in refusal("model", tmp_path)
    del hub.raw["dit.safetensors"]
    hub.edits[MODEL] = edited(size=None, lfs=None, blobId=None)
    assert fetch("model").read_bytes() == FILES["dit.safetensors"]


def test_a_file_that_the_disk_cannot_hold_is_refused_before_it_is_written(hub, tmp_path):
    hub.edits[MODEL] = edited(size=(1 << 63) - 1)
    with pytest.raises(OSError, match=r"No space left on device.*HF_HUB_CACHE.* for dit.safetensors, 9,223"):
        fetch("model")
    assert not list((tmp_path / "cache").glob("*/blobs/*"))


def test_a_continuation_from_another_place_is_refused(hub, tmp_path):
    def answers(place):
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 63\r\n\r\nweights"
        head = f"HTTP/1.1 206 Partial\r\nContent-Range: {place}\r\nContent-Length: 56\r\n\r\n"
        yield head.encode() + b"weights" * 8

    for place in ("", "bytes", "bytes 0-5/63", "bytes 9-62/63", "bytes x-y/z"):
        hub.raw["dit.safetensors"] = InTurn(answers(place))
        assert "does not continue dit.safetensors where it broke" in refusal("model", tmp_path), place
    hub.raw["dit.safetensors"] = InTurn(answers("bytes 7-1/0"))
    assert fetch("model").read_bytes() == FILES["dit.safetensors"]


class InTurn:
    """One answer after the other."""

    def __init__(self, answers):
        self.answers = answers

    def __iter__(self):
        return iter([next(self.answers)])


@pytest.mark.parametrize("end", ["blobs=true", "/dit.safetensors"])
def test_an_answer_that_trickles_is_given_up(hub, tmp_path, monkeypatch, end):
    monkeypatch.setattr(hub_client, "_PATIENCE", 0.0)
    monkeypatch.setattr(hub_client, "_SLOWEST", 1e12)
    hub.raw[end] = [b"HTTP/1.1 200 OK\r\n\r\n"] + [b" "] * 63
    assert "arrives too slowly" in refusal("model", tmp_path)


@pytest.mark.parametrize("end", ["blobs=true", "/dit.safetensors"])
def test_the_head_of_an_answer_that_does_not_end_is_given_up(hub, tmp_path, monkeypatch, end):
    left = threading.Event()

    def head():
        yield b"HTTP/1.1 200 OK\r\nA: "
        left.wait(30)

    class Heads:
        def __iter__(self):
            return head()

    monkeypatch.setattr(hub_client, "_HEAD_PATIENCE", 0.2)
    hub.raw[end] = Heads()
    try:
        assert "arrives too slowly" in refusal("model", tmp_path)
    finally:
        left.set()


NOT_HTTP = [
    b"\x1b[2J\r\n\r\n", b"HTTP/1.1 200 \x1b[2J\r\n\r\n{}", b"HTTP/9 200 OK\r\n\r\n", b"HTTP/1.1 999 X\r\n\r\n", b"",
    b"HTTP/1.1 000 X\r\n\r\n", b"HTTP/1.1 304 X\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffffffff\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\x1b[2J\r\n", b"HTTP/1.1 503 \x1b[2J\r\n\r\n",
    b"HTTP/1.1 418 \x1b[2J\r\nX-Error-Message: \x1b[2J\r\nX-Error-Code: \x1b[2J\r\n\r\n",
    b"HTTP/1.1 429 X\r\nRetry-After: 0\r\nRateLimit: \"\x1b\";r=0;t=0\r\n\r\n",
]  # fmt: skip


@KINDS
def test_an_answer_that_is_not_http_is_a_sentence(hub, tmp_path, kind):
    for answer in NOT_HTTP:
        hub.raw = {end: [answer] for end in ("blobs=true", "expand=sha", "recursive=true")}
        refusal(kind, tmp_path)
        hub.raw = {"recursive=true": [answer], "dit.safetensors": [answer]}
        refusal(kind, tmp_path)
        hub.raw = {"dit.safetensors": [answer], "a.mp4": [answer]}
        refusal(kind, tmp_path)


def test_an_address_that_is_not_a_hubs_is_refused(hub, tmp_path, monkeypatch):
    for endpoint in ("", "x", "ftp://x", "http://", "http://[", "http://x:99999", "http://\x1b[2J", "file:///"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert "expected the address of a hub" in refusal("model", tmp_path), endpoint


def test_names_that_the_file_system_takes_for_one_are_refused(hub, tmp_path):
    folder = fetch("dataset")
    (folder / "in/A.mp4").symlink_to("../../../blobs/other")
    (tmp_path / "cache/datasets--a--clips/blobs/other").write_bytes(b"other")
    with pytest.raises(WeightsError, match=r"A.mp4 is in the way; another file has that name"):
        repository._link(folder / "in/A.mp4", (folder / "in/a.mp4").resolve())
    assert (folder / "in/A.mp4").read_bytes() == b"other"


def test_a_recorded_revision_of_another_form_is_not_followed(hub, tmp_path):
    fetch_parts(HubName("a/model"), ["config.json"])
    (tmp_path / "outside").mkdir()
    (tmp_path / "cache/models--a--model/refs/main").write_text("../../../outside")
    assert Repository("a/model").snapshot(None) is None
    assert issubclass(WeightsError, PusaError)
