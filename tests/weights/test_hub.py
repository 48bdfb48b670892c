import errno
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from pusa.errors import WeightsError
from pusa.weights.hub import HubName, choose, fetch_file, fetch_parts
from tests.helpers.hub_server import Sent

REPO = "genmo/tiny-mochi"
CHUNK = 1 << 16
BIG = random.Random(0).randbytes(16 * CHUNK)
SHARDS = {
    "transformer/diffusion_pytorch_model{}": 5,
    "transformer/diffusion_pytorch_model.bf16{}": 3,
    "text_encoder/model{}": 4,
    "text_encoder/model.bf16{}": 2,
}
MOCHI = [
    *(".gitattributes", "README.md", "decoder.safetensors", "dit.safetensors", "encoder.safetensors"),
    *("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"),
    *("text_encoder/model.safetensors.index.bf16.json", "text_encoder/model.safetensors.index.json"),
    *("tokenizer/added_tokens.json", "tokenizer/special_tokens_map.json", "tokenizer/spiece.model"),
    *("tokenizer/tokenizer_config.json", "transformer/config.json"),
    "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    *("vae/config.json", "vae/diffusion_pytorch_model.bf16.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    *(form.format(f"-{i:05}-of-{n:05}.safetensors") for form, n in SHARDS.items() for i in range(1, n + 1)),
]
FILES = {
    "model_index.json": b"{}",
    "README.md": b"Not wanted.",
    "scheduler/scheduler_config.json": b'{"shift": 1}',
    "transformer/config.json": b'{"layers": 1}',
    "transformer/diffusion_pytorch_model.safetensors": b"plain" + BIG,
    "transformer/diffusion_pytorch_model.bf16.safetensors": BIG,
    "transformer/diffusion_pytorch_model.bin": b"pickle",
    "vae/config.json": b'{"channels": 12}',
    "vae/diffusion_pytorch_model.safetensors": b"small",
}
WEIGHTS = "transformer/diffusion_pytorch_model.bf16.safetensors"
NAME = HubName(REPO)
PARTS = ("transformer", "vae")
WANTED = ["model_index.json", "transformer/config.json", WEIGHTS, *(name for name in FILES if name.startswith("vae/"))]


@pytest.fixture
def hub(empty_hub, monkeypatch):
    """A hub with a small model on it, sent in small pieces."""
    empty_hub.add(REPO, FILES)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    return empty_hub


def sentence(call, *args) -> str:
    with pytest.raises(WeightsError) as caught:
        call(*args)
    return str(caught.value)


def downloaded(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text, name",
    [
        ("hf:genmo/mochi-1-preview", HubName("genmo/mochi-1-preview")),
        ("hf:a/b@refs/pr/4", HubName("a/b", "refs/pr/4")),
        ("hf:a/b:vae/model@2.safetensors", HubName("a/b", None, "vae/model@2.safetensors")),
        ("hf:a/b@v1.0:dit.safetensors", HubName("a/b", "v1.0", "dit.safetensors")),
    ],
)
def test_a_name_reads_as_it_is_written(text, name):
    assert HubName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "hf:", "hf:b", "hf:a/b/c", "a/b", "hf:/a/b", "hf:a/", "hf:a/..", "hf:a b/c", "hf:a/b--c", "hf:a/b:c:d"),
        *("hf:a/b@", "hf:a/b:", "hf:a/b@:c", "hf:a/b@v@w", "hf:a/b@../c", "hf:a/b@/v"),
        *("hf:a/b:/etc/passwd", "hf:a/b:../c", "hf:a/b:c/../../d", "hf:a/b:c//d", "hf:a/b:c\\..\\d"),
    ],
)
def test_any_other_name_is_refused(text):
    form = "hf:ORG/NAME[@revision][:file], with no '..' and no empty part"
    assert sentence(HubName.parse, text) == f"{text!r} names nothing on a model hub; the form is {form}"


def test_of_mochi_the_bf16_weights_are_chosen():
    chosen = choose(MOCHI, ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"))
    folders = ("transformer/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")
    plain = [f for f in MOCHI if f.endswith((".safetensors", ".index.json")) and "bf16" not in f]
    wanted = [f for f in MOCHI if f == "model_index.json" or (f.startswith(folders) and f not in plain)]
    assert sorted(chosen) == sorted(wanted)
    assert len(chosen) == 1 + (1 + 1 + 3) + (1 + 1) + (1 + 1 + 2) + 4 + 1


def test_plain_weights_are_chosen_where_there_are_no_others():
    other = ["vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin.index.json", "vae/x.ckpt"]
    plain = [f for f in MOCHI if "bf16" not in f]
    assert choose([*plain, *other], ("vae",)) == [
        *("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors")
    ]
    assert len(choose(plain, ("transformer",))) == 1 + 1 + 1 + 5


def test_a_part_may_be_one_file():
    parts = ["vae/config.json", "dit.safetensors", "LICENSE"]
    assert choose([*MOCHI, "LICENSE"], parts) == ["model_index.json", *parts]


def test_single_files_stand_in_for_folders_that_are_missing():
    singles = ["decoder.safetensors", "dit.safetensors", "encoder.safetensors", "README.md"]
    assert sorted(choose(singles, PARTS)) == sorted(singles[:3])
    folder = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert choose([*singles, *folder], ("vae",)) == folder


INDEXLESS = ["t/m-00001-of-00002.safetensors", "t/m-00002-of-00002.safetensors"]
SINGLE = "a folder or encoder.safetensors and decoder.safetensors"


@pytest.mark.parametrize(
    "files, part, said",
    [
        (
            ["README.md", "vae.bin", "x/a", "x/b"],
            "tokenizer",
            "there is no 'tokenizer' (a folder), but README.md, vae.bin, x",
        ),
        (["decoder.safetensors"], "vae", f"there is no 'vae' ({SINGLE}), but decoder.safetensors"),
        ([], "vae", f"there is no 'vae' ({SINGLE}), but nothing"),
        (
            ["vae/config.json", "vae/m.bin"],
            "vae",
            "there are no whole safetensors in 'vae', but vae/config.json, vae/m.bin",
        ),
        (["t/m.bin"], "t", "there are no whole safetensors in 't', but t/m.bin"),
        (INDEXLESS, "t", f"there are no whole safetensors in 't', but {', '.join(INDEXLESS)}"),
        (
            ["t/m-00002-of-00002.safetensors", "t/m.safetensors.index.json"],
            "t",
            "there are no whole safetensors in 't', but t/m-00002-of-00002.safetensors, t/m.safetensors.index.json",
        ),
        (["vae/config.json", "a"], "vae/confg.json", "there is no file 'vae/confg.json', but vae/config.json"),
        (
            [*"abcdefghij"],
            "vae/config.json",
            "there is no file 'vae/config.json', but a, b, c, d, e, f, g, h and 2 more",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_is_there(files, part, said):
    assert sentence(choose, files, (part,)) == said


def test_parts_come_alone_and_once(hub, caplog):
    caplog.set_level(logging.INFO, "pusa.weights.hub")
    folder = fetch_parts(NAME, PARTS)
    assert downloaded(folder) == {name: FILES[name] for name in WANTED}
    assert sorted(sent.file for sent in hub.sent) == sorted(WANTED)
    size = sum(len(FILES[name]) for name in WANTED)
    assert caplog.messages == [f"hf:{REPO}: downloading 5 files, {size} bytes"]

    hub.requests.clear()
    assert fetch_parts(NAME, PARTS) == folder
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}"]
    assert fetch_parts(NAME, ["scheduler"]) == folder
    assert hub.sent[len(WANTED) :] == [Sent("scheduler/scheduler_config.json")]


def test_a_file_comes_alone_and_once(hub):
    path = fetch_file(HubName(REPO, None, WEIGHTS))
    assert path.read_bytes() == BIG
    assert fetch_file(HubName(REPO, None, WEIGHTS)) == path
    assert fetch_file(HubName(REPO, None, "vae/config.json")).read_bytes() == FILES["vae/config.json"]
    assert hub.sent == [Sent(WEIGHTS), Sent("vae/config.json")]


def test_a_revision_is_a_name_or_a_commit(hub):
    old = hub.add(REPO, {"config.json": b"old"}, "v1/first")
    new = hub.add(REPO, {"config.json": b"new"})
    for revision, data in ((None, b"new"), ("v1/first", b"old"), (old, b"old"), (new, b"new")):
        path = fetch_file(HubName(REPO, revision, "config.json"))
        assert path.read_bytes() == data
        assert path.parent.name in (old, new)
    assert hub.sent == [Sent("config.json")] * 2


def test_a_revision_fetched_by_its_commit_is_there_offline_by_its_name(hub, monkeypatch):
    folder = fetch_parts(HubName(REPO, hub.commits[REPO, "main"]), PARTS)
    assert fetch_parts(NAME, PARTS) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_parts(NAME, PARTS) == folder


def test_a_token_is_shown_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch_file(HubName(REPO, None, WEIGHTS))
    shown = {(request.host, request.token) for request in hub.requests if "agent" not in request.path}
    assert shown == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_several_processes_download_once(hub):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch_file, [HubName(REPO, None, WEIGHTS)] * 4))
    assert [path.read_bytes() for path in paths] == [BIG]
    assert hub.sent == [Sent(WEIGHTS)]


def test_a_cut_connection_is_taken_up_by_the_same_call(hub):
    hub.breaking(WEIGHTS.split("/")[1], 5 * CHUNK + 1)
    assert fetch_file(HubName(REPO, None, WEIGHTS)).read_bytes() == BIG
    assert hub.sent == [Sent(WEIGHTS), Sent(WEIGHTS, 5 * CHUNK)]


def test_a_broken_connection_is_taken_up_by_the_same_command(hub):
    hub.breaking(WEIGHTS.split("/")[1], 5 * CHUNK, "reset")
    said = sentence(fetch_parts, NAME, PARTS)
    assert said.startswith(f"hf:{REPO}: the connection to the hub {hub.url} broke (")
    assert said.endswith("); the same command goes on from where it broke")
    assert downloaded(fetch_parts(NAME, PARTS))[WEIGHTS] == BIG
    first, second = [sent.start for sent in hub.sent if sent.file == WEIGHTS]
    assert first == 0 < second <= 5 * CHUNK


def command(hub, tmp_path, name, **env):
    code = "import sys; from pusa.weights.hub import *; print(fetch_file(HubName.parse(sys.argv[1])))"
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    return subprocess.Popen(
        [sys.executable, "-c", code, name],
        env={**os.environ, **place, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_download_is_taken_up_by_the_same_command(hub, tmp_path):
    chunk, data = 10 << 20, random.Random(1).randbytes(13 << 20)  # the library's own chunk
    hub.add("a/b", {"big.safetensors": data})
    held = hub.breaking("big.safetensors", chunk + 1, "hold")
    killed = command(hub, tmp_path, "hf:a/b:big.safetensors")
    assert held.reached.wait(20)
    partial = tmp_path / f"home/hub/models--a--b/blobs/{hashlib.sha256(data).hexdigest()}.incomplete"
    for _ in range(400):
        if partial.exists() and partial.stat().st_size == chunk:
            break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    held.released.set()

    out, errors = command(hub, tmp_path, "hf:a/b:big.safetensors").communicate()
    assert hub.sent == [Sent("big.safetensors"), Sent("big.safetensors", chunk)]
    assert (tmp_path / out.strip()).read_bytes() == data
    assert [path.name for path in partial.parent.iterdir()] == [hashlib.sha256(data).hexdigest()]
    assert errors == "", "a progress bar belongs on a terminal alone"


def test_a_spoilt_download_is_removed(hub, tmp_path):
    partial = tmp_path / f"cache/models--genmo--tiny-mochi/blobs/{hashlib.sha256(BIG).hexdigest()}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(CHUNK))
    spoilt = f"hf:{REPO}: {WEIGHTS} came damaged and was removed; the same command downloads it anew"
    assert sentence(fetch_parts, NAME, PARTS) == spoilt
    assert not partial.exists()
    partial.write_bytes(bytes(len(BIG) + 1))
    assert downloaded(fetch_parts(NAME, PARTS))[WEIGHTS] == BIG


GATED = "the repository is gated; ask for access at {hub}/{repo}, then give your token by HF_TOKEN or `hf auth login`"
UNKNOWN = (
    "{hub} has no such repository, or it is private; check the name, or give a token by HF_TOKEN or `hf auth login`"
)


@pytest.mark.parametrize(
    "refusal, said",
    [
        ((401, "GatedRepo", "Access is restricted"), GATED),
        ((403, "GatedRepo", "Not in the authorized list"), GATED),
        ((401, None, "Invalid username or password."), UNKNOWN),
        ((404, "RepoNotFound", "Repository not found"), UNKNOWN),
        (
            (410, None, "Gone"),
            "the hub {hub} answered 410 Gone; try later, the same command goes on from where it broke",
        ),
    ],
)
@pytest.mark.parametrize("all_of_it", [False, True])
def test_what_the_hub_refuses_is_said_in_a_sentence(hub, refusal, said, all_of_it):
    (hub.down if all_of_it else hub.refused)[REPO] = refusal
    said = f"hf:{REPO}: {said.format(hub=hub.url, repo=REPO)}"
    assert sentence(fetch_parts, NAME, PARTS) == said
    assert sentence(fetch_parts, NAME, ["scheduler"]) == said


def test_what_the_hub_does_not_have_is_said_in_a_sentence(hub):
    unknown = f"hf:a/nothing: {UNKNOWN.format(hub=hub.url)}"
    assert sentence(fetch_parts, HubName("a/nothing"), PARTS) == unknown
    revision = f"{hub.url}/{REPO} has no revision 'v9'; allowed are a branch, a tag or a commit"
    assert sentence(fetch_parts, HubName(REPO, "v9"), PARTS) == f"hf:{REPO}@v9: {revision}"
    near = "there is no file 'vae/confg.json', but vae/config.json"
    assert sentence(fetch_file, HubName(REPO, None, "vae/confg.json")).startswith(f"hf:{REPO}:vae/confg.json: {near}")
    there = "README.md, model_index.json, scheduler, transformer, vae"
    said = f"hf:{REPO}: there is no 'tokenizer' (a folder), but {there}"
    assert sentence(fetch_parts, NAME, ["tokenizer"]) == said
    assert not hub.sent


def test_a_name_of_the_wrong_kind_is_refused():
    assert sentence(fetch_file, NAME) == f"hf:{REPO} names no file; the form is hf:{REPO}:file"
    said = f"hf:{REPO}:a.json names one file; a whole model is hf:ORG/NAME[@revision]"
    assert sentence(fetch_parts, HubName(REPO, None, "a.json"), PARTS) == said


OFFLINE = "HF_HUB_OFFLINE=1 forbids to ask the hub; unset it to download"


def test_offline_the_cache_serves(hub, tmp_path, monkeypatch):
    nothing = f"hf:{REPO}: in the cache {tmp_path / 'cache'} there is no finished download of it; and {OFFLINE}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sentence(fetch_parts, NAME, PARTS) == nothing
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetch_parts(NAME, PARTS)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_parts(NAME, PARTS) == folder
    assert fetch_file(HubName(REPO, None, WEIGHTS)) == folder / WEIGHTS
    said = f"there is no 'scheduler' (a folder), but model_index.json, transformer, vae; and {OFFLINE}"
    assert sentence(fetch_parts, NAME, ["scheduler"]) == f"hf:{REPO}: in the cache {tmp_path / 'cache'} {said}"
    (folder / WEIGHTS).unlink()
    said = f"there are no whole safetensors in 'transformer', but transformer/config.json; and {OFFLINE}"
    assert sentence(fetch_parts, NAME, PARTS) == f"hf:{REPO}: in the cache {tmp_path / 'cache'} {said}"
    assert not hub.requests


def test_offline_is_set_by_the_environment(hub, tmp_path):
    assert command(hub, tmp_path, f"hf:{REPO}:vae/config.json").wait() == 0
    hub.requests.clear()
    out, _ = command(hub, tmp_path, f"hf:{REPO}:vae/config.json", HF_HUB_OFFLINE="1").communicate()
    assert out.strip().endswith("vae/config.json")
    _, errors = command(hub, tmp_path, f"hf:{REPO}:{WEIGHTS}", HF_HUB_OFFLINE="1").communicate()
    said = f"there is no file {WEIGHTS!r}, but vae/config.json; and {OFFLINE}"
    assert f"hf:{REPO}:{WEIGHTS}: in the cache {tmp_path / 'home/hub'} {said}" in errors
    assert not hub.requests


@pytest.mark.parametrize("status", [None, 429, 503])
def test_a_hub_that_cannot_be_asked_is_replaced_by_the_cache(hub, tmp_path, monkeypatch, status):
    folder = fetch_parts(NAME, PARTS)
    if status is None:
        hub.shutdown()
        hub.server_close()
        close_session()
        broke = f"the connection to the hub {hub.url} broke ([Errno {errno.ECONNREFUSED}] Connection refused)"
        said = f"{broke}; the same command goes on from where it broke"
    else:
        hub.down[REPO] = (status, None, "Busy")
        reason = {429: "429 Too Many Requests", 503: "503 Service Unavailable"}[status]
        said = f"the hub {hub.url} answered {reason}; try later, the same command goes on from where it broke"
    assert fetch_parts(NAME, PARTS) == folder
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    there = f"in the cache {tmp_path / 'empty'} there is no finished download of it"
    assert sentence(fetch_parts, NAME, PARTS) == f"hf:{REPO}: {there}; and {said}"


def test_what_is_no_hub_is_called_that(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.RequestHandlerClass, "send_json", lambda self, value: self.send_bytes(200, b"<html>", {}))
    said = f"what answers at {hub.url} is no hub; check HF_ENDPOINT and the proxy"
    there = f"in the cache {tmp_path / 'cache'} there is no finished download of it"
    assert sentence(fetch_parts, NAME, PARTS) == f"hf:{REPO}: {there}; and {said}"


def test_names_are_read_without_torch():
    code = (
        "import sys, pusa.weights.hub; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
