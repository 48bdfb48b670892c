"""`pusa evaluate`: the table, JSON and page of runs, exit codes for schedules, and nothing written into a run."""

import json
import os
import subprocess
import sys
from base64 import b64decode, b64encode
from hashlib import sha256
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from flows.commands import main
from pusa.evaluate import page as page_files
from pusa.generate.stage import generate
from pusa.video.media import write_video
from tests.helpers.evaluated_runs import done, failed, put_run, waiting
from tests.helpers.pages import Page
from tests.helpers.stub_model import StubModel, manifest_of

HOSTILE = "</script></style><script>alert(1)</script><img src=http://a.b/c.png onerror=x>\x1b[2J\u202e\ud800'\""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "red.mp4"
    write_video(path, np.full((9, 32, 48, 3), (200, 30, 30), np.uint8), 12)
    return path


@pytest.fixture
def runs(tmp_path, video):
    """Two runs: in the second, one job is better, one is worse, one is new, and one failed."""
    first = {"a": done(video, {"given_psnr": 30, "motion": 2}), "b": done(video, {"given_psnr": 28, "motion": 3})}
    second = {"a": done(video, {"given_psnr": 33, "motion": 2}), "b": done(video, {"given_psnr": 27, "motion": 1})}
    put_run(tmp_path / "1", {**first, "c": failed(HOSTILE), "d": waiting()})
    put_run(tmp_path / "2", {**second, "c": failed(), "new": done(video, {"given_psnr": 31}, prompt=HOSTILE)})
    return str(tmp_path / "1"), str(tmp_path / "2")


@pytest.mark.parametrize(
    "words, code, text",
    [
        ("", 0, ""),
        ("--require given_psnr>=28 --require mean(given_psnr)>=29", 0, "2 of 2 requirements are met"),
        ("--require given_psnr>=29", 3, "given_psnr>=29: 1 of 2 jobs: b 28"),
        ("--require loop_closure<2", 3, "no job has loop_closure"),
        ("--require given_pnsr>=28", 2, "did you mean 'given_psnr'?"),
        ("--require given_psnr=28", 2, "expected NAME>=NUMBER"),
        ("--require change(motion)>0", 2, "a change needs two runs"),
        ("--sort moton", 2, "--sort: 'moton' is not a number of videos; did you mean 'motion'?"),
        ("--columns motion,seams", 2, "'seams' is not a number of videos; expected one of given_psnr, "),
        ("--columns motion,", 2, "'' is not a number of videos"),
        ("--jsn x", 2, "--json"),
        ("--json --html x.html", 2, "'--html' is not a file; expected a path, or - for standard output"),
    ],
)
def test_the_exit_code_says_whether_each_requirement_is_met(tmp_path, video, capsys, words, code, text):
    jobs = {"a": done(video, {"given_psnr": 30, "motion": 2}), "b": done(video, {"given_psnr": 28, "motion": 3})}
    run = put_run(tmp_path / "run", jobs)
    assert main(["evaluate", str(run), *words.split()]) == code
    captured = capsys.readouterr()
    assert text in captured.out + captured.err and "Traceback" not in captured.err


def test_two_runs_are_compared_and_judged_by_the_second(runs, capsys):
    assert (
        main(["evaluate", *runs, "--columns", "motion", "--sort", "motion", "--require", "change(motion)>=-0.5"]) == 3
    )
    captured = capsys.readouterr()
    assert captured.out.index("b ") < captured.out.index("a ") and "given" not in captured.out
    assert "change(motion)>=-0.5: 1 of 2 jobs: b -2" in captured.err
    assert "without a video: c (failed), d (not in the second run)" in captured.err
    assert captured.out.replace("\n", "").isprintable()


def test_a_folder_that_is_no_run_is_an_error(tmp_path, runs, capsys):
    for words in ([str(tmp_path)], [runs[0], str(tmp_path / "none")]):
        assert main(["evaluate", *words]) == 1
        assert "has no jobs" in capsys.readouterr().err


def test_json_on_standard_output_is_nothing_but_json(runs, tmp_path, capsys):
    assert main(["evaluate", *runs, "--json", "-", "--require", "mean(given_psnr)>0"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out, parse_constant=pytest.fail)
    assert [job["id"] for job in found["jobs"]] == ["a", "b", "c", "d", "new"]
    assert found["jobs"][1]["change"] == {"given_psnr": -1.0, "motion": -2.0}
    assert found["jobs"][1]["second"]["numbers"] == {"given_psnr": 27.0, "motion": 1.0}
    assert found["worst"]["change"]["given_psnr"] == {"id": "b", "value": -1.0}
    assert found["numbers"]["given_psnr"]["better"] == "high" and not found["requirements"][0]["met"]
    assert main(["evaluate", *runs, "--json", str(tmp_path / "deep/er/found.json")]) == 0
    found["requirements"] = []
    assert json.loads((tmp_path / "deep/er/found.json").read_text()) == found


def test_nothing_is_written_in_place_of_a_run_or_of_its_videos(runs, capsys):
    videos = f"{runs[1]}/videos"
    os.symlink(videos, f"{runs[0]}/link")
    before = sorted(os.listdir(videos))
    for option, name in (
        ("--json", "a.json"),
        ("--html", "../videos/a.mp4"),
        ("--vbench", "x"),
        ("--vbench", "."),
        ("--vbench", ".."),
    ):
        for folder in (videos, f"{runs[0]}/link"):
            assert main(["evaluate", *runs, option, f"{folder}/{name}"]) == 2
            assert "which is only read" in capsys.readouterr().err
    assert sorted(os.listdir(videos)) == before


def test_the_page_holds_its_pictures_and_only_its_own_script_acts(runs, tmp_path):
    assert main(["evaluate", *runs, "--html", str(tmp_path / "page.html"), "--require", "motion>=2"]) == 3
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    (policy,) = (tag["content"] for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    hashes = []
    for name in ("style", "script"):
        inner = text.split(f"<{name}>")[1].split(f"</{name}>")[0]
        hashes.append(f"'sha256-{b64encode(sha256(inner.encode()).digest()).decode()}'")
    assert policy == (
        f"default-src 'none'; img-src data:; style-src {hashes[0]}; script-src {hashes[1]}; base-uri 'none'; "
        "form-action 'none'"
    )
    assert len(page.of("script")) == len(page.of("style")) == 1 and text.isascii()
    assert not [name for _, tag in page.tags for name in tag if name.startswith("on") or name in ("style", "href")]
    pictures = [tag["src"].removeprefix("data:image/jpeg;base64,") for tag in page.of("img")]
    assert len(pictures) == 5
    strip = np.asarray(Image.open(BytesIO(b64decode(pictures[0], validate=True))))
    assert strip.shape == (72, 8 * 108, 3) and abs(strip.mean((0, 1)) - (200, 30, 30)).max() < 8
    jobs = {tag["data-id"]: json.loads(tag["data-values"]) for tag in page.of("tbody")}
    assert jobs == {"a": [3.0, 0.0], "b": [-1.0, -2.0], "c": [None, None], "d": [None, None], "new": [None, None]}
    assert "motion>=2 is not met" in page.text and "absent" in page.text and "alert(1)" in page.text
    kinds = [tag.get("class") for tag in page.of("td")]
    assert kinds.count("number gain") == 1 and kinds.count("number loss") == 1


def test_a_video_that_cannot_be_read_has_its_poster_and_no_other_file(tmp_path):
    numbers = {"motion": 2}
    run = put_run(tmp_path / "run", {id: done(None, numbers) for id in ("poster", "text", "large", "link", "none")})
    previews = run / "videos/previews"
    previews.mkdir()
    Image.new("RGB", (8, 8)).save(previews / "poster.jpg")
    (previews / "text.jpg").write_text("secret")
    (previews / "large.jpg").write_bytes(b"\xff\xd8" + bytes(page_files.LARGEST_PICTURE))
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    (previews / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert main(["evaluate", str(run), "--html", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert [tag["alt"] for tag in page.of("img")] == ["frames of poster"] and len(page.of("tbody")) == 5


def test_videos_for_vbench_are_those_of_the_last_run(runs, tmp_path):
    assert main(["evaluate", *runs, "--vbench", str(tmp_path / "vbench")]) == 0
    prompts = json.loads((tmp_path / "vbench/prompts.json").read_bytes())
    assert list(prompts.values()) == ["a boat", "a boat", HOSTILE]


def test_a_run_that_pusa_made_is_evaluated_without_torch(tmp_path):
    jobs = {"free": {}, "still": {"task": "image_to_video", "image": str(tmp_path / "still.png")}}
    Image.new("RGB", (32, 32), "red").save(tmp_path / "still.png")
    generate(manifest_of(*({"id": id, **job} for id, job in jobs.items())), tmp_path / "run", StubModel)
    code = f"""
import sys
from flows.commands import main
assert main(["evaluate", {str(tmp_path / "run")!r}, "--json", "-"]) == 0
assert not {{"torch", "prefect"}} & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    free, still = (job["first"] for job in json.loads(ended.stdout)["jobs"])
    assert free["state"] == still["state"] == "done" and not free["unmeasured"]
    assert "given_psnr" in still["numbers"] and "given_psnr" not in free["numbers"]
    share = still["numbers"]["motion_share"]
    assert share == pytest.approx(still["numbers"]["motion"] / free["numbers"]["motion"])
