"""Downloads from a hub: which files are chosen, what is kept after failures, and the sentence for each refusal."""

import errno
import fcntl
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.utils import close_session

from pusa.backbones import find_family
from pusa.errors import StageError, WeightsError
from pusa.weights import repository
from pusa.weights.hub import HubName, cached_file, choose_files, fetch_file, fetch_parts
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
    "README.md": b"Not needed.",
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
NEEDED = ["model_index.json", "transformer/config.json", WEIGHTS, *(name for name in FILES if name.startswith("vae/"))]


@pytest.fixture
def hub(empty_hub, monkeypatch):
    """A hub with a small model on it, sent in small pieces."""
    empty_hub.add(REPO, FILES)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    return empty_hub


def message_of(call, *args) -> str:
    """Return the message of the WeightsError that a call raises."""
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
def test_a_parsed_name_prints_as_it_was_written(text, name):
    assert HubName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "hf:", "hf:b", "hf:a/b/c", "a/b", "hf:/a/b", "hf:a/", "hf:a/..", "hf:a b/c", "hf:a/b--c", "hf:a/b:c:d"),
        *("hf:a/b:c\0d", "hf:a/b@\x1b", "hf:a/b:c\ud800", f"hf:a/b:{'x' * 256}"),
        *("hf:a/b@", "hf:a/b:", "hf:a/b@:c", "hf:a/b@v@w", "hf:a/b@../c", "hf:a/b@/v"),
        *("hf:a/b:/etc/passwd", "hf:a/b:../c", "hf:a/b:c/../../d", "hf:a/b:c//d", "hf:a/b:c\\..\\d"),
    ],
)
def test_a_name_of_another_form_is_refused(text):
    form = "hf:ORG/NAME[@revision][:file] without '..' or empty components"
    assert message_of(HubName.parse, text) == f"{text!r} is not a valid name on a model hub; expected {form}"


def test_bf16_weights_are_chosen_from_the_published_files():
    chosen = choose_files(MOCHI, ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"))
    folders = ("transformer/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")
    plain = [f for f in MOCHI if f.endswith((".safetensors", ".index.json")) and "bf16" not in f]
    expected = [f for f in MOCHI if f == "model_index.json" or (f.startswith(folders) and f not in plain)]
    assert sorted(chosen) == sorted(expected)
    assert len(chosen) == 1 + (1 + 1 + 3) + (1 + 1) + (1 + 1 + 2) + 4 + 1


def test_plain_weights_are_chosen_if_there_are_no_bf16_weights():
    other = ["vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin.index.json", "vae/x.ckpt"]
    plain = [f for f in MOCHI if "bf16" not in f]
    assert choose_files([*plain, *other], ("vae",)) == [
        *("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors")
    ]
    assert len(choose_files(plain, ("transformer",))) == 1 + 1 + 1 + 5


def test_a_part_may_be_one_file():
    parts = ["vae/config.json", "dit.safetensors", "LICENSE"]
    assert choose_files([*MOCHI, "LICENSE"], parts) == ["model_index.json", *parts]


def test_single_files_replace_missing_folders():
    singles = ["decoder.safetensors", "dit.safetensors", "encoder.safetensors", "README.md"]
    assert sorted(choose_files(singles, PARTS)) == sorted(singles[:3])
    folder = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert choose_files([*singles, *folder], ("vae",)) == folder


INDEXLESS = ["t/m-00001-of-00002.safetensors", "t/m-00002-of-00002.safetensors"]
SINGLE = "a folder or encoder.safetensors and decoder.safetensors"


@pytest.mark.parametrize(
    "files, part, message",
    [
        (
            ["README.md", "vae.bin", "x/a", "x/b"],
            "tokenizer",
            "no 'tokenizer' (expected a folder); found README.md, vae.bin, x",
        ),
        (["decoder.safetensors"], "vae", f"no 'vae' (expected {SINGLE}); found decoder.safetensors"),
        ([], "vae", f"no 'vae' (expected {SINGLE}); found nothing"),
        (
            ["vae/config.json", "vae/m.bin"],
            "vae",
            "no complete set of safetensors files in 'vae'; found vae/config.json, vae/m.bin",
        ),
        (["t/m.bin"], "t", "no complete set of safetensors files in 't'; found t/m.bin"),
        (INDEXLESS, "t", f"no complete set of safetensors files in 't'; found {', '.join(INDEXLESS)}"),
        (
            ["t/m-00002-of-00002.safetensors", "t/m.safetensors.index.json"],
            "t",
            "no complete set of safetensors files in 't'; found t/m-00002-of-00002.safetensors, "
            "t/m.safetensors.index.json",
        ),
        (["vae/config.json", "a"], "vae/confg.json", "no file 'vae/confg.json'; found vae/config.json"),
        ([*"abcdefghij"], "vae/config.json", "no file 'vae/config.json'; found a, b, c, d, e, f, g, h and 2 more"),
    ],
)
def test_the_message_names_what_is_missing_and_what_was_found(files, part, message):
    assert message_of(choose_files, files, (part,), find_family()) == message


def test_only_the_needed_files_are_downloaded_and_only_once(hub, caplog):
    caplog.set_level(logging.INFO, "pusa.weights.hub")
    folder = fetch_parts(NAME, PARTS)
    assert downloaded(folder) == {name: FILES[name] for name in NEEDED}
    assert sorted(sent.file for sent in hub.sent) == sorted(NEEDED)
    size = sum(len(FILES[name]) for name in NEEDED)
    assert caplog.messages[0] == f"hf:{REPO}: downloading 5 files, {size} bytes"

    hub.requests.clear()
    assert fetch_parts(NAME, PARTS) == folder
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}"]
    assert fetch_parts(NAME, ["scheduler"]) == folder
    assert hub.sent[len(NEEDED) :] == [Sent("scheduler/scheduler_config.json")]


def test_one_file_is_downloaded_alone_and_only_once(hub):
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


def test_a_revision_fetched_by_its_commit_is_found_offline_by_its_name(hub, monkeypatch):
    folder = fetch_parts(HubName(REPO, hub.commits[REPO, "main"]), PARTS)
    assert fetch_parts(NAME, PARTS) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_parts(NAME, PARTS) == folder


def test_a_token_is_sent_to_the_hub_only(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch_file(HubName(REPO, None, WEIGHTS))
    sent = {(request.host, request.token) for request in hub.requests if "agent" not in request.path}
    assert sent == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


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


def test_processes_that_share_a_cache_download_a_file_once(hub, tmp_path):
    held = hub.breaking(WEIGHTS.split("/")[1], 0, "hold")
    processes = [command(hub, tmp_path, f"hf:{REPO}:{WEIGHTS}") for _ in range(3)]
    assert held.reached.wait(60)
    held.released.set()  # the first download fails here, and its own process resumes it
    paths = {process.communicate()[0].strip() for process in processes}
    assert [Path(path).read_bytes() for path in paths] == [BIG]
    assert hub.sent == [Sent(WEIGHTS), Sent(WEIGHTS)]


def test_threads_that_share_a_cache_download_a_file_once(hub):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch_file, [HubName(REPO, None, WEIGHTS)] * 4))
    assert [path.read_bytes() for path in paths] == [BIG]
    assert hub.sent == [Sent(WEIGHTS)]


def test_a_cut_connection_is_resumed_by_the_same_call(hub):
    hub.breaking(WEIGHTS.split("/")[1], 5 * CHUNK + 1)
    assert fetch_file(HubName(REPO, None, WEIGHTS)).read_bytes() == BIG
    assert hub.sent == [Sent(WEIGHTS), Sent(WEIGHTS, 5 * CHUNK + 1)]


def test_after_a_failed_download_the_same_command_completes_it(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "_WAIT", 0.0)
    hub.breaking(WEIGHTS.split("/")[1], 5 * CHUNK, "reset")
    for _ in range(5):  # attempts in a row that bring nothing
        hub.breaking(WEIGHTS.split("/")[1], 0, "reset")
    message = message_of(fetch_parts, NAME, PARTS)
    assert message.startswith(f"hf:{REPO}: the connection to the hub {hub.url} broke (")
    assert message.endswith("); run the same command again")
    assert not list(tmp_path.glob("cache/**/*.incomplete"))
    finished = [sent.file for sent in hub.sent if sent.file != WEIGHTS]
    assert finished == NEEDED[:2]

    hub.sent.clear()
    assert downloaded(fetch_parts(NAME, PARTS)) == {name: FILES[name] for name in NEEDED}
    assert sorted(sent.file for sent in hub.sent) == sorted(set(NEEDED) - set(finished))


def test_after_a_kill_the_same_command_completes_the_download(hub, tmp_path):
    chunk, data = 10 << 20, random.Random(1).randbytes(13 << 20)  # the library's own chunk
    hub.add("a/b", {"big.safetensors": data})
    held = hub.breaking("big.safetensors", chunk + 1, "hold")
    killed = command(hub, tmp_path, "hf:a/b:big.safetensors")
    assert held.reached.wait(60)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    held.released.set()
    folder = tmp_path / "home/hub/models--a--b"
    assert not list(folder.glob("snapshots/*/*")), "a file that is half there must not be used"

    out, errors = command(hub, tmp_path, "hf:a/b:big.safetensors").communicate()
    assert hub.sent == [Sent("big.safetensors"), Sent("big.safetensors")]
    assert (tmp_path / out.strip()).read_bytes() == data
    finished = [path.name for path in (folder / "blobs").iterdir() if path.suffix != ".incomplete"]
    assert finished == [hashlib.sha256(data).hexdigest()]
    assert errors == "", "a progress bar is drawn only on a terminal"


DAMAGED = f"hf:{REPO}: {WEIGHTS} arrived damaged and was removed; run the same command again to download it"


def test_a_file_with_other_bytes_than_listed_is_refused_and_removed(hub, tmp_path):
    hub.breaking(WEIGHTS.split("/")[1], CHUNK, "damage")
    assert message_of(fetch_parts, NAME, PARTS) == DAMAGED
    assert not list(tmp_path.glob(f"cache/**/{hashlib.sha256(BIG).hexdigest()}"))
    assert downloaded(fetch_parts(NAME, PARTS))[WEIGHTS] == BIG


def test_a_file_that_was_not_checked_before_an_interrupt_is_not_used(hub, tmp_path, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    hub.breaking(WEIGHTS.split("/")[1], CHUNK, "damage")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(repository, "_is_whole", lambda path, file: path.exists() and killed(file))
        fetch_file(HubName(REPO, None, WEIGHTS))
    assert cached_file(HubName(REPO, hub.commits[REPO, "main"], WEIGHTS)) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "no finished download" in message_of(fetch_file, HubName(REPO, hub.commits[REPO, "main"], WEIGHTS))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not list(tmp_path.glob("cache/*/blobs/*"))
    assert downloaded(fetch_parts(NAME, PARTS))[WEIGHTS] == BIG


def test_content_that_the_cache_holds_already_is_checked_before_it_is_used(hub, tmp_path):
    folder = fetch_parts(NAME, PARTS)
    commit = hub.add(REPO, {**FILES, "new.json": b"{}"})
    (folder / WEIGHTS).resolve().write_bytes(BIG[:-1] + b"?")
    assert downloaded(fetch_parts(HubName(REPO, commit), PARTS))[WEIGHTS] == BIG
    assert [sent.file for sent in hub.sent].count(WEIGHTS) == 2
    assert len(hub.sent) == len(NEEDED) + 1, "what is whole is not downloaded again"


GATED = "the repository is gated; ask for access at {hub}/{repo}, then give your token by HF_TOKEN or `hf auth login`"
UNKNOWN = (
    "{hub} has no such repository, or it is private; check the name, or give a token by HF_TOKEN or `hf auth login`"
)


@pytest.mark.parametrize(
    "refusal, message",
    [
        ((401, "GatedRepo", "Access is restricted"), GATED),
        ((403, "GatedRepo", "Not in the authorized list"), GATED),
        ((401, None, "Invalid username or password."), UNKNOWN),
        ((404, "RepoNotFound", "Repository not found"), UNKNOWN),
        (
            (410, None, "Gone"),
            "the hub {hub} answered 410 Gone; run the same command again later",
        ),
    ],
)
@pytest.mark.parametrize("whole_repository", [False, True])
def test_a_refusal_is_reported_in_a_sentence(hub, refusal, message, whole_repository):
    (hub.down if whole_repository else hub.refused)[REPO] = refusal
    expected = f"hf:{REPO}: {message.format(hub=hub.url, repo=REPO)}"
    assert message_of(fetch_parts, NAME, PARTS) == expected
    assert message_of(fetch_parts, NAME, ["scheduler"]) == expected


def test_a_missing_repository_revision_or_file_is_reported_in_a_sentence(hub):
    unknown = f"hf:a/nothing: {UNKNOWN.format(hub=hub.url)}"
    assert message_of(fetch_parts, HubName("a/nothing"), PARTS) == unknown
    revision = f"{hub.url}/{REPO} has no revision 'v9'; expected a branch, a tag or a commit"
    assert message_of(fetch_parts, HubName(REPO, "v9"), PARTS) == f"hf:{REPO}@v9: {revision}"
    near = "no file 'vae/confg.json'; found vae/config.json"
    assert message_of(fetch_file, HubName(REPO, None, "vae/confg.json")).startswith(f"hf:{REPO}:vae/confg.json: {near}")
    found = "README.md, model_index.json, scheduler, transformer, vae"
    expected = f"hf:{REPO}: no 'tokenizer' (expected a folder); found {found}"
    assert message_of(fetch_parts, NAME, ["tokenizer"], find_family()) == expected
    assert not hub.sent


def test_a_model_is_not_a_file_and_a_file_is_not_a_model():
    assert message_of(fetch_file, NAME) == f"hf:{REPO} does not name a file; expected hf:{REPO}:file"
    expected = f"hf:{REPO}:a.json names one file; expected a whole model: hf:ORG/NAME[@revision]"
    assert message_of(fetch_parts, HubName(REPO, None, "a.json"), PARTS) == expected


OFFLINE = "HF_HUB_OFFLINE=1 forbids requests to the hub; unset it to download"


def test_offline_the_cache_is_used(hub, tmp_path, monkeypatch):
    place = f"hf:{REPO}: in the cache {tmp_path / 'cache'}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert message_of(fetch_parts, NAME, PARTS) == f"{place}: no finished download. Also, {OFFLINE}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetch_parts(NAME, PARTS)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_parts(NAME, PARTS) == folder
    assert fetch_file(HubName(REPO, None, WEIGHTS)) == folder / WEIGHTS
    lack = "no 'scheduler' (expected a folder); found model_index.json, transformer, vae"
    assert message_of(fetch_parts, NAME, ["scheduler"]) == f"{place}: {lack}. Also, {OFFLINE}"
    (folder / WEIGHTS).unlink()
    lack = "no complete set of safetensors files in 'transformer'; found transformer/config.json"
    assert message_of(fetch_parts, NAME, PARTS) == f"{place}: {lack}. Also, {OFFLINE}"
    assert not hub.requests


def test_the_environment_sets_offline(hub, tmp_path):
    assert command(hub, tmp_path, f"hf:{REPO}:vae/config.json").wait() == 0
    hub.requests.clear()
    out, _ = command(hub, tmp_path, f"hf:{REPO}:vae/config.json", HF_HUB_OFFLINE="1").communicate()
    assert out.strip().endswith("vae/config.json")
    _, errors = command(hub, tmp_path, f"hf:{REPO}:{WEIGHTS}", HF_HUB_OFFLINE="1").communicate()
    message = f"no file {WEIGHTS!r}; found vae/config.json. Also, {OFFLINE}"
    assert f"hf:{REPO}:{WEIGHTS}: in the cache {tmp_path / 'home/hub'}: {message}" in errors
    assert not hub.requests


@pytest.mark.parametrize("status", [None, 429, 503])
def test_the_cache_is_used_if_the_hub_cannot_be_reached(hub, tmp_path, monkeypatch, status):
    folder = fetch_parts(NAME, PARTS)
    if status is None:
        hub.shutdown()
        hub.server_close()
        close_session()
        broke = f"the connection to the hub {hub.url} broke ([Errno {errno.ECONNREFUSED}] Connection refused)"
        message = f"{broke}; run the same command again"
    else:
        hub.down[REPO] = (status, None, "Busy")
        reason = {429: "429 Too Many Requests", 503: "503 Service Unavailable"}[status]
        message = f"the hub {hub.url} answered {reason}; run the same command again later"
    assert fetch_parts(NAME, PARTS) == folder
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    expected = f"hf:{REPO}: in the cache {tmp_path / 'empty'}: no finished download. Also, {message}"
    assert message_of(fetch_parts, NAME, PARTS) == expected


def test_a_cache_that_cannot_lock_is_named(hub, tmp_path, monkeypatch):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StageError, match=f"{constants.HF_HUB_CACHE}.* cannot be locked .No locks available.*HF_HUB_"):
        fetch_parts(NAME, PARTS)


def test_a_server_that_is_not_a_hub_is_reported_as_that(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.RequestHandlerClass, "send_json", lambda self, value: self.send_bytes(200, b"<html>", {}))
    message = f"the server at {hub.url} does not answer as a model hub; check HF_ENDPOINT and the proxy"
    expected = f"hf:{REPO}: in the cache {tmp_path / 'cache'}: no finished download. Also, {message}"
    assert message_of(fetch_parts, NAME, PARTS) == expected


def test_reading_names_does_not_import_torch():
    code = (
        "import sys, pusa.weights.hub; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_cache_without_links_holds_the_files_themselves(hub, monkeypatch):
    def refuse(link, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = fetch_parts(NAME, PARTS)
    assert downloaded(folder) == {name: FILES[name] for name in NEEDED}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    hub.sent.clear()
    assert fetch_parts(NAME, PARTS) == folder and not hub.sent


def test_a_complete_cache_that_is_read_only_is_used(hub, monkeypatch, caplog):
    folder = fetch_parts(HubName(REPO, hub.commits[REPO, "main"]), PARTS)

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(repository, "publish", refuse)
    assert fetch_parts(NAME, PARTS) == folder
    assert "the commit cannot be recorded" in caplog.text


def test_the_cache_is_shared_with_huggingface_hub(hub, tmp_path):
    folder = fetch_parts(NAME, PARTS)
    hub.sent.clear()
    assert try_to_load_from_cache(REPO, WEIGHTS) == str(folder / WEIGHTS)
    assert hf_hub_download(REPO, "vae/config.json") == str(folder / "vae/config.json") and not hub.sent
    (cached,) = scan_cache_dir(tmp_path / "cache").repos
    assert [(revision.refs, revision.snapshot_path) for revision in cached.revisions] == [({"main"}, folder)]
    assert hf_hub_download(REPO, "README.md") == str(folder / "README.md")
    assert fetch_file(HubName(REPO, None, "README.md")) == folder / "README.md" and hub.sent == [Sent("README.md")]
