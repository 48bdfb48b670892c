"""A run's numbers are read as its records have them, whatever else these hold, and two runs are put side by side."""

import json

import pytest

from pusa.errors import ManifestError, MediaError
from pusa.evaluate.listing import as_json, notes, table_lines
from pusa.evaluate.runs import KNOWN, compare_runs, read_run
from pusa.generate.numbers import NUMBERS
from tests.helpers.evaluated_runs import JOB, done, failed, put_run, waiting

TEXT_JOB = {"task": "text_to_video"}
HOSTILE = "</td><script>alert(1)</script>\x1b[2J\u202e\ud800"
DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000


def files_of(run):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def test_each_job_is_a_row_with_its_state_and_nothing_is_written(tmp_path):
    jobs = {"b": done(numbers={"motion": 2, "given_psnr": 31.5}), "a": failed(), "c": waiting()}
    run = put_run(tmp_path / "run", jobs)
    before = files_of(run)
    comparison = compare_runs([run])
    rows = {line.id: line.rows[0] for line in comparison.lines}
    assert {id: row.state for id, row in rows.items()} == {"b": "done", "a": "failed", "c": "waiting"}
    assert list(rows) == ["b", "a", "c"] and rows["b"].numbers == {"given_psnr": 31.5, "motion": 2.0}
    assert rows["a"].why == "none.txt is not a picture" and rows["a"].numbers == rows["c"].numbers == {}
    assert comparison.columns == ["given_psnr", "motion"]
    assert files_of(run) == before


def test_what_calls_from_python_made_is_read_without_a_list_and_half_written_records_are_not(tmp_path):
    run = put_run(tmp_path, {"a": done(numbers={"motion": 2})}, listed=False)
    (run / "videos/.partial-00-b.json").write_text("{")
    assert list(read_run(run)) == ["a"]


@pytest.mark.parametrize("content", [None, b"{}", b"\x00"])
def test_a_folder_without_jobs_or_with_a_damaged_list_is_an_error(tmp_path, content):
    (tmp_path / "videos/.work").mkdir(parents=True)
    if content is not None:
        (tmp_path / "videos/.work/jobs.json").write_bytes(content)
    with pytest.raises((ManifestError, MediaError), match=r"jobs\.json"):
        compare_runs([tmp_path])


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1e300, 10**400, True, None, "31", [31], {"a": 31}], ids=str
)
def test_a_value_that_is_not_a_number_is_unusable_and_named(tmp_path, value):
    run = put_run(tmp_path, {"a": done(numbers={"motion": value, "flicker": 0.5, "elsewhere": 3})})
    row = read_run(run)["a"]
    assert row.numbers == {"flicker": 0.5} and row.unusable == ("motion",)
    assert any("not numbers: 'a'" in note for note in notes(compare_runs([run])))


@pytest.mark.parametrize(
    "stretches, kept",
    [
        ([[0, 3], [7, 8]], [[0, 3], [7, 8]]),
        ([[0, float("nan")], [1], "ab", {"0": 1}, 5, [True, 2], [1, 2]], [[1, 2]]),
        ([[n, n] for n in range(10_000)], [[n, n] for n in range(20)]),
        ("frozen", None),
    ],
)
def test_stretches_are_read_as_far_as_they_are_ones(tmp_path, stretches, kept):
    run = put_run(tmp_path, {"a": done(numbers={"frozen_frames": 6, "frozen": stretches})})
    assert read_run(run)["a"].stretches.get("frozen") == kept


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"[1]", DEEP, b'{"status": "done", "key": "k", "job": {"task": [1]}, "numbers": [1]}']
)
def test_a_record_of_another_shape_costs_its_own_numbers_alone(tmp_path, content):
    run = put_run(tmp_path, {"a": done(), "b": done(numbers={"motion": 2})})
    (run / "videos/a.json").write_bytes(content)
    comparison = compare_runs([run])
    assert [line.sides[0] for line in comparison.lines] == [{}, {"motion": 2.0}]
    assert table_lines(comparison) and json.dumps(as_json(comparison, []), allow_nan=False)


def test_hostile_texts_do_not_steer_a_terminal(tmp_path):
    jobs = {"a": done(numbers={"motion": 2}, prompt=HOSTILE, seed=HOSTILE, task=HOSTILE), "b": failed(HOSTILE)}
    comparison = compare_runs([put_run(tmp_path, jobs)])
    assert all(line.isprintable() for line in [*table_lines(comparison), *notes(comparison)])
    assert json.dumps(as_json(comparison, []), ensure_ascii=False).isprintable()


@pytest.mark.parametrize("name", ["a.json", "a.mp4"])
def test_a_link_that_leads_out_of_the_run_is_not_followed(tmp_path, name, small_video):
    run = put_run(tmp_path / "run", {"a": done(small_video, {"motion": 2})})
    (run / "videos" / name).rename(tmp_path / name)
    (run / "videos" / name).symlink_to(tmp_path / name)
    row = read_run(run)["a"]
    assert row.state == "failed" and row.why == f"{name} is a link that leads out of the run"
    assert row.video is None and row.numbers == {}


def test_links_inside_a_run_and_to_a_whole_run_are_followed(tmp_path):
    run = put_run(tmp_path / "run", {"a": done(numbers={"motion": 2})})
    (run / "videos/a.mp4").rename(run / "videos/kept")
    (run / "videos/a.mp4").symlink_to(run / "videos/kept")
    (tmp_path / "link").symlink_to(run)
    assert read_run(tmp_path / "link")["a"].is_made
    (run / "videos/a.mp4").unlink()
    (run / "videos/a.mp4").symlink_to("a.mp4")
    assert not read_run(run)["a"].is_made


def test_motion_is_shared_with_the_video_without_given_frames_of_the_same_settings(tmp_path):
    free = {"free": done(numbers={"motion": 4}, **TEXT_JOB), "later": done(numbers={"motion": 9}, **TEXT_JOB)}
    first = {
        "a": done(numbers={"motion": 3}),
        "b": done(numbers={"motion": 3}, seed=4),
        "c": done(numbers={"flicker": 1}),
    }
    runs = [put_run(tmp_path / "1", {**free, **first})]
    assert {id: row.numbers.get("motion_share") for id, row in read_of(runs)[0].items()} == {
        "free": None, "later": None, "a": 0.75, "b": None, "c": None,
    }  # fmt: skip
    other = {"b": done(numbers={"motion": 2}, seed=4, **TEXT_JOB), "free": done(numbers={"motion": 6}, **TEXT_JOB)}
    runs.append(put_run(tmp_path / "2", other))
    rows, _ = read_of(runs)
    assert rows["b"].numbers["motion_share"] == 1.5  # the other run has one
    assert rows["a"].numbers["motion_share"] == 0.75  # of its own run, first


def read_of(runs):
    lines = compare_runs(runs).lines
    return [{line.id: line.rows[side] for line in lines if line.rows[side]} for side in range(len(runs))]


def test_a_motionless_video_without_given_frames_gives_no_share(tmp_path):
    jobs = {"free": done(numbers={"motion": 0}, **TEXT_JOB), "a": done(numbers={"motion": 3})}
    assert "motion_share" not in read_run(put_run(tmp_path, jobs))["a"].numbers
    assert compare_runs([tmp_path]).values(0, "motion_share") == {}


def test_two_runs_are_side_by_side_by_id_and_no_job_is_dropped(tmp_path):
    first = {"a": done(numbers={"motion": 2, "flicker": 1}), "b": failed(), "old": done(numbers={"motion": 1})}
    second = {"new": done(numbers={"motion": 9}), "b": done(numbers={"motion": 5}), "a": done(numbers={"motion": 2.5})}
    comparison = compare_runs([put_run(tmp_path / "1", first), put_run(tmp_path / "2", second)])
    assert [line.id for line in comparison.lines] == ["a", "b", "old", "new"]
    assert [line.sides[2] for line in comparison.lines] == [{"motion": 0.5}, {}, {}, {}]
    assert dict(comparison.missing()) == {"first": ["new"], "second": ["old"]}
    found = as_json(comparison, [])
    assert found["jobs"][1]["first"]["state"] == "failed" and found["jobs"][3]["first"] is None
    assert found["mean"]["change"] == {"motion": 0.5, "flicker": None}
    lines = table_lines(comparison)
    assert [line.split() for line in lines[1:4]] == [
        ["a", "first", "done", "2", "1"], ["second", "done", "2.5"], ["change", "+0.5"],
    ]  # fmt: skip
    assert lines[10].split() == ["new", "first", "absent"]
    assert {"1 not in the first run: 'new'", "1 not in the second run: 'old'"} <= set(notes(comparison))


def test_the_worst_come_first_and_jobs_without_a_number_last(tmp_path):
    values = {"a": 31.0, "b": None, "c": 25.0, "d": 40.0}
    jobs = {
        id: done(numbers={} if v is None else {"given_psnr": v, "flicker": v, "motion": v}) for id, v in values.items()
    }
    comparison = compare_runs([put_run(tmp_path / "1", jobs)])
    for name, order in (("given_psnr", "cadb"), ("flicker", "dacb"), ("motion", "dacb")):
        assert "".join(line.id for line in comparison.sorted_by(name).lines) == order
    assert comparison.worst(0, "given_psnr") == ("c", 25.0) and comparison.worst(0, "flicker") == ("d", 40.0)
    assert comparison.worst(0, "motion") is None and comparison.mean(0, "motion") == 32.0
    changed = {"a": 30.0, "c": 26.0, "d": 20.0}
    second = {id: done(numbers={"given_psnr": v, "motion": v}) for id, v in changed.items()}
    both = compare_runs([tmp_path / "1", put_run(tmp_path / "2", second)])
    assert "".join(line.id for line in both.sorted_by("given_psnr").lines) == "dacb"
    assert "".join(line.id for line in both.sorted_by("motion").lines)[0] == "d"  # the largest change


def test_a_narrow_terminal_has_the_columns_in_several_tables(tmp_path):
    numbers = dict.fromkeys(NUMBERS, 12.345678)
    comparison = compare_runs([put_run(tmp_path, {"a-long-id": done(numbers=numbers), "b": failed()})])
    whole, narrow = table_lines(comparison), table_lines(comparison, 60)
    assert max(map(len, whole)) > 60 >= max(map(len, narrow))
    words = " ".join(narrow)
    assert words.count("12.35") == 2 * len(NUMBERS) + sum(KNOWN[name].better is not None for name in NUMBERS)
    assert words.count("a-long-id") == narrow.count("") + 1 > 1
    assert max(map(len, table_lines(comparison, 1))) < 60  # a column at a time


def test_a_video_of_an_earlier_version_has_what_its_record_and_if_asked_its_file_give(tmp_path, small_video):
    jobs = {"a": done(small_video), "b": done(numbers={"motion": 3})}
    jobs["a"]["record"]["seams"] = {"0": 1.5, "3": 2.5, "4": None}
    run = put_run(tmp_path, {**jobs, "broken": done()})
    before = files_of(run)
    rows = read_run(run)
    assert rows["a"].unmeasured and rows["a"].numbers == {"worst_seam": 2.5} and not rows["b"].unmeasured
    measured = read_run(run, measure=True)
    expected = 2 * 4 * 16 * 130 / (48 * 32)  # levels: two edges of the square, as wide as it moves
    assert measured["a"].numbers["motion"] == pytest.approx(expected, rel=0.1)
    assert {"flicker", "vmaf_motion", "spatial_information", "frozen_frames"} <= measured["a"].numbers.keys()
    assert not {"given_psnr", "loop_closure"} & measured["a"].numbers.keys() and measured["a"].unmeasured
    assert measured["b"].numbers == {"motion": 3} and measured["broken"].numbers == {}
    assert "broken.mp4" in measured["broken"].why
    assert files_of(run) == before


def test_the_settings_that_are_compared_are_those_of_jobs():
    from pusa.evaluate.runs import ALIKE

    assert set(ALIKE) <= JOB.keys()
