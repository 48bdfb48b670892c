"""`pusa gallery`: the page of a run, written anew, and served to a browser until it is interrupted."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from flows.commands import main
from pusa.generate.stage import generate
from tests.helpers.stub_model import StubModel, manifest_of


@pytest.fixture
def run(tmp_path):
    generate(manifest_of({"id": "a"}, {"id": "b"}), tmp_path / "my run", StubModel)
    return tmp_path / "my run"


def test_the_page_is_written_from_the_files_as_they_are(run, capsys):
    page = run / "videos/gallery.html"
    page.unlink()
    (run / "videos/b.json").unlink()
    (run / "videos/b.mp4").unlink()
    assert main(["gallery", str(run)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text()
    assert 'data-id="a" data-state="done"' in text and 'data-id="b" data-state="waiting"' in text


def test_videos_of_calls_from_python_are_shown_in_the_order_in_which_they_were_made(tmp_path, capsys):
    for number, id in enumerate("bac"):
        generate(manifest_of({"id": id, "seed": number}), tmp_path, StubModel, shown=False)
        os.utime(tmp_path / f"videos/{id}.json", (number, number))
    assert main(["gallery", str(tmp_path)]) == 0
    assert re.findall(r'data-id="(\w)"', (tmp_path / "videos/gallery.html").read_text()) == ["b", "a", "c"]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x00", b'{"version": 1, "jobs": [], "sha256": "0"}'])
def test_a_folder_without_a_list_of_jobs_is_an_error(tmp_path, capsys, content):
    (tmp_path / "videos/.work").mkdir(parents=True)
    if content is not None:
        (tmp_path / "videos/.work/jobs.json").write_bytes(content)
    assert main(["gallery", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "jobs.json" in error and "Traceback" not in error
    assert not (tmp_path / "videos/gallery.html").exists()


@contextmanager
def served(run):
    """Start a server of a run's gallery; yield its process."""
    words = [sys.executable, "-m", "flows", "gallery", str(run), "--serve", "--port", "0"]
    environment = {**os.environ, "NO_PROXY": "*"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_is_served_until_it_is_interrupted(run):
    with served(run) as process, served(run) as another:  # both start at once, which takes most of the time
        address = address_of(process)
        transport = httpx.HTTPTransport(retries=5)  # it listens a moment after it says so
        with httpx.Client(follow_redirects=True, trust_env=False, transport=transport, timeout=30) as browser:
            page = browser.get(address)
            assert page.status_code == 200 and 'data-id="a"' in page.text
            base = str(page.url).removesuffix("gallery.html")
            part = browser.get(f"{base}a.mp4", headers={"range": "bytes=0-9"})
            assert part.status_code == 206 and len(part.content) == 10
            for path in (".work/jobs.json", "../.lock", "..%2f..%2f"):
                assert 'data-id="a"' in browser.get(base + path).text or browser.get(base + path).is_error
            assert browser.get(address, headers={"host": "evil.test"}).status_code == 421
            assert browser.post(f"{base}a.mp4").is_error
            assert browser.get(address_of(another)).status_code == 200
        for server, end in ((process, signal.SIGINT), (another, signal.SIGTERM)):
            server.send_signal(end)
            assert server.wait(30) == 0 and "Traceback" not in server.stderr.read()


def address_of(process) -> str:
    """Return the address that a server prints after what it does and the page's path."""
    begins, _, at = (process.stdout.readline() for _ in range(3))
    assert begins.startswith("writing the gallery of ")
    return re.findall(r"http://127\.0\.0\.1:\d+/", at)[0]


def test_an_address_beyond_this_machine_is_a_choice(run, capsys):
    assert main(["gallery", str(run), "--serve", "--host", "my.phone"]) == 2
    assert "is not an IP address" in capsys.readouterr().err
