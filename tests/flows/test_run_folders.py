"""Run folders in a browser: what is shown, what does not exist for it, who is asked for credentials, and the index."""

import asyncio
import base64
import os
from pathlib import Path
from urllib.parse import unquote

import pytest

from flows.run_folders import RunFolders, find_galleries, index_page
from pusa.generate.page import script_source

SECRET = "käthe:a b:c"


async def prefect(scope, receive, send):
    """Stand for Prefect's app: answer everything with 299."""
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(app, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return the status, the headers and the body of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": unquote(path), "headers": pairs, "asgi": {"spec_version": "2.4"}}
    asyncio.run(app(scope, None, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def run(tmp_path) -> Path:
    """Return the folder of a run, whose name has characters that mean something in patterns and addresses."""
    folder = tmp_path / "runs" / "a {x} ü#?"
    (folder / "videos/.work").mkdir(parents=True)
    (folder / "videos/gallery.html").write_text("<video src='v.mp4'>")
    (folder / "videos/v.mp4").write_bytes(bytes(range(100)))
    for name in ("videos/v.json", "videos/.work/jobs.json", "videos/.lock", "m.yaml"):
        (folder / name).write_text("{}")
    (tmp_path / "secret").write_text("secret")
    return folder


def test_a_file_is_shown_with_its_type_and_in_parts(run):
    app, base = RunFolders(prefect, [str(run)]), f"/runs{run}"
    status, headers, body = ask(app, f"{base}/videos/v.mp4")
    assert (status, headers["content-type"], body) == (200, "video/mp4", bytes(range(100)))
    status, headers, body = ask(app, f"{base}/videos/v.mp4", range="bytes=10-19")
    assert (status, headers["content-range"], body) == (206, "bytes 10-19/100", bytes(range(10, 20)))
    assert ask(app, f"{base}/videos/v.mp4", range="bytes=200-")[0] == 416
    status, headers, body = ask(app, f"{base}/videos/v.mp4", "HEAD")
    assert (status, headers["content-length"], body) == (200, "100", b"")
    assert ask(app, f"{base}/videos/v.mp4", if_none_match=headers["etag"])[0] == 304
    assert ask(app, f"{base}/m.yaml")[1]["content-type"].startswith("text/plain")


def test_a_page_of_a_run_folder_plays_its_videos_and_no_script_but_the_gallerys_runs(run):
    policy = ask(RunFolders(prefect, [str(run)]), f"/runs{run}/videos/gallery.html")[1]["content-security-policy"]
    parts = dict(part.split(" ", 1) for part in policy.split("; "))
    assert parts["default-src"] == "'none'" and parts["media-src"] == "'self'"
    assert parts["script-src"] == script_source() and not {"connect-src", "frame-src"} & parts.keys()


@pytest.mark.parametrize(
    "path",
    [
        "videos/.lock", "videos/.work/jobs.json", "videos/.work", "inner.json", "inner/jobs.json",  # hidden
        "../../secret", "..%2f..%2fsecret", "videos/../../../secret", "/etc/passwd", "//etc/passwd", "outer",
        "outer-folder/secret", "pipe", "videos", "videos/", "", "none", "videos/v.mp4/x", "%00", "x" * 300, "%ff",
    ],
)  # fmt: skip
def test_what_is_hidden_outside_or_not_a_file_does_not_exist(run, path):
    (run / "inner.json").symlink_to("videos/.work/jobs.json")
    (run / "inner").symlink_to("videos/.work")
    (run / "outer").symlink_to(run.parent.parent / "secret")
    (run / "outer-folder").symlink_to(run.parent.parent)
    os.mkfifo(run / "pipe")
    assert ask(RunFolders(prefect, [str(run)]), f"/runs{run}/{path}")[0] == 404


@pytest.mark.parametrize("path", ["/runs/etc/passwd", "/runs//etc/passwd", "/runs/../etc/passwd"])
def test_only_the_given_folders_are_shown(run, path):
    assert ask(RunFolders(prefect, [str(run)]), path)[0] == 404
    assert ask(RunFolders(prefect, [str(run)]), f"/runs{run}x/videos/v.mp4")[0] == 404


def test_a_hidden_folder_that_was_given_is_shown(tmp_path):
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run/a.txt").write_text("a")
    assert ask(RunFolders(prefect, [f"{tmp_path}/.run/"]), f"/runs{tmp_path}/.run/a.txt")[2] == b"a"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_run_folders_can_only_be_read(run, method):
    app = RunFolders(prefect, [str(run)])
    assert ask(app, f"/runs{run}/m.yaml", method)[0] == ask(app, "/runs/", method)[0] == 405


@pytest.mark.parametrize("path", ["/", "/runs", "/api/health", "/runs/flow-run/1", "/runs/task-run/1", "/runsx/"])
def test_pages_of_prefect_stay(run, path):
    assert ask(RunFolders(prefect, [str(run)]), path)[0] == 299


def test_everything_asks_for_the_credentials_of_the_api(run):
    app = RunFolders(prefect, [str(run)], SECRET)
    right = base64.b64encode(SECRET.encode()).decode()
    wrong = ["", "Basic", f"Bearer {right}", "Basic ü", "Basic " + base64.b64encode(b"a:b").decode()]
    for path in ("/runs/", f"/runs{run}/m.yaml", f"/runs{run}/none", "/runs/etc/passwd"):
        for given in ({}, *({"authorization": text} for text in wrong)):
            status, headers, _ = ask(app, path, **given)
            assert status == 401 and headers["www-authenticate"].startswith("Basic ")
    assert ask(app, f"/runs{run}/m.yaml", authorization=f"Basic {right}")[0] == 200
    assert ask(app, f"/runs{run}/m.yaml", authorization=f"basic  {right}")[0] == 200


def test_the_index_lists_galleries_newest_first_with_counts_and_as_text(run):
    bad = run.parent / "<script>&"
    (bad / "deeper/videos").mkdir(parents=True)
    (bad / "deeper/videos/gallery.html").touch()
    (run.parent / "link").symlink_to(run)
    (run.parent / ".hidden").mkdir()
    (run.parent / ".hidden/gallery.html").touch()
    (bad / "deeper/videos/drafts").mkdir()
    for name in ("a.mp4", "a.json", "drafts/a.mp4", "drafts/b.mp4", "drafts/b.json", "c.json"):
        (bad / "deeper/videos" / name).touch()
    os.utime(bad / "deeper/videos/gallery.html", (0, 0))
    found = find_galleries([str(run.parent), str(run), "/none"])
    assert [gallery[2:] for gallery in found] == [(1, 1, 3), (1, 0, 1)]
    page = index_page([str(run.parent)])
    assert "<script>" not in page and "&lt;script&gt;&amp;/deeper" in page
    assert "1 video<" in page and "1 job<" in page and page.index("a {x}") < page.index("deeper")
    link = page.split('href="')[1].split('"')[0]
    assert ask(RunFolders(prefect, [str(run.parent)]), link)[0] == 200
    assert "No run has a gallery yet" in index_page(["/none"])
