"""Requirements are read as they are meant, and whatever cannot be judged does not meet them."""

import pytest

from pusa.errors import PartlyFailed
from pusa.evaluate.runs import compare_runs
from pusa.evaluate.thresholds import check_requirements, parse_requirement, require_all
from tests.helpers.evaluated_runs import done, failed, put_run, waiting


@pytest.mark.parametrize(
    "text, expected",
    [
        ("given_psnr>=30", ("given_psnr", ">=", 30.0, False, False)),
        (" mean ( given_psnr ) < 3.5e1 ", ("given_psnr", "<", 35.0, True, False)),
        ("change(motion)>=-0.5", ("motion", ">=", -0.5, False, True)),
        ("mean(change(motion_share))>+.5", ("motion_share", ">", 0.5, True, True)),
    ],
)
def test_a_requirement_is_read(text, expected):
    one = parse_requirement(text)
    assert (one.name, one.sign, one.bound, one.of_mean, one.of_change) == expected
    assert parse_requirement(one.text) == one


@pytest.mark.parametrize(
    "text",
    [
        "", "given_psnr", "given_psnr>=", ">=30", "given_psnr=30", "given_psnr>=nan", "given_psnr>=inf",
        "given_psnr>=1e999", "given_psnr>=1_0", "mean(given_psnr>=30", "given_psnr)>=30", "change(mean(motion))>0",
        "max(motion)>0", "mean(mean(motion))>0", "given_psnr>=30,motion>0", "x" * 100_000, "motion>٣",
        "motion" + " " * 1000 + ">0",
    ],
)  # fmt: skip
def test_what_is_not_a_requirement_is_refused_with_the_form_of_one(text):
    with pytest.raises(ValueError, match=r"not a requirement; expected NAME>=NUMBER, mean\(NAME\)>=NUMBER"):
        parse_requirement(text)


def test_an_unknown_number_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="'given_pnsr' is not a number of videos; did you mean 'given_psnr'"):
        parse_requirement("mean(given_pnsr)>=30")
    with pytest.raises(ValueError, match="'key' is not a number of videos; expected one of given_psnr, "):
        parse_requirement("key>=30")


FIRST = {"a": {"given_psnr": 30, "motion": 2}, "b": {"given_psnr": 20, "motion": 4}, "t": {"motion": 1}}
SECOND = {"a": {"given_psnr": 35, "motion": 1}, "b": {"given_psnr": 24, "motion": 4.5}, "t": {"motion": 1}}


def made(run, jobs):
    return put_run(run, {id: done(numbers=numbers) for id, numbers in jobs.items()})


@pytest.fixture
def one(tmp_path):
    return compare_runs([made(tmp_path / "first", FIRST)])


@pytest.fixture
def two(tmp_path):
    return compare_runs([made(tmp_path / "first", FIRST), made(tmp_path / "second", SECOND)])


def problems(comparison, text):
    (outcome,) = check_requirements(comparison, [parse_requirement(text)])
    assert outcome.as_json() == {"requirement": text, "met": not outcome.problems, "problems": list(outcome.problems)}
    return list(outcome.problems)


@pytest.mark.parametrize("text", ["given_psnr>=20", "given_psnr>19", "given_psnr<=30", "given_psnr<31"])
def test_a_requirement_holds_for_each_job_that_has_the_number(one, text):
    assert problems(one, text) == []


@pytest.mark.parametrize(
    "text, problem",
    [
        ("given_psnr>20", "1 of 2 jobs: b 20"), ("given_psnr>=30.5", "2 of 2 jobs: b 20, a 30"),
        ("given_psnr<30", "1 of 2 jobs: a 30"), ("given_psnr<=2e1", "1 of 2 jobs: a 30"),
        ("mean(given_psnr)>25", "the mean of 2 jobs is 25"), ("loop_closure<2", "no job has loop_closure"),
        ("mean(loop_closure)<2", "no job has loop_closure"),
    ],
)  # fmt: skip
def test_what_does_not_meet_it_is_named_the_worst_first(one, text, problem):
    assert problems(one, text) == [f"{text}: {problem}"]
    with pytest.raises(PartlyFailed, match="first does not meet 1 of 2 requirements"):
        require_all(one, check_requirements(one, [parse_requirement(text), parse_requirement("motion>0")]))


def test_with_two_runs_the_second_is_judged_and_changes_are_its_numbers_minus_those_of_the_first(two):
    assert problems(two, "given_psnr>=24") == [] == problems(two, "mean(change(given_psnr))>=4.5")
    assert problems(two, "change(motion)>=-0.5") == ["change(motion)>=-0.5: 1 of 3 jobs: a -1"]
    assert problems(two, "mean(change(motion))>0") == ["mean(change(motion))>0: the mean of 3 jobs is -0.166667"]
    assert problems(two, "change(flicker)<0") == ["change(flicker)<0: no job has flicker in both runs"]


def test_a_job_without_a_video_meets_no_requirement_and_is_said_once(tmp_path):
    good = done(numbers={"given_psnr": 40, "motion": 2})
    first = put_run(tmp_path / "first", {"a": good, "gone": good})
    second = put_run(tmp_path / "second", {"a": good, "bad": failed(), "slow": waiting()})
    comparison = compare_runs([first, second])
    text = "without a video: gone (not in the second run), bad (failed), slow (waiting)"
    assert problems(comparison, "given_psnr>=30") == [text] == problems(comparison, "mean(change(motion))>=0")
    with pytest.raises(PartlyFailed) as error:
        require_all(
            comparison, check_requirements(comparison, [*map(parse_requirement, ("given_psnr>=30", "motion>=0"))])
        )
    assert str(error.value).count(text) == 1 and "2 of 2 requirements" in str(error.value)
    assert problems(compare_runs([first]), "given_psnr>=30") == []


def test_a_value_that_is_none_and_a_record_without_numbers_meet_no_requirement(tmp_path):
    jobs = {"a": done(numbers={"motion": 3}), "nan": done(numbers={"motion": float("nan")}), "old": done()}
    comparison = compare_runs([put_run(tmp_path, jobs)])
    assert problems(comparison, "motion>=1") == ["motion>=1: not a number in the records of nan, old"]
    assert problems(comparison, "motion_share>=1")[1:] == ["motion_share>=1: not a number in the records of nan, old"]


def test_of_many_jobs_the_first_are_listed(tmp_path):
    comparison = compare_runs([put_run(tmp_path, {f"j{n}": done(numbers={"motion": n}) for n in range(100)})])
    (problem,) = problems(comparison, "motion>=1000")
    assert problem.startswith("motion>=1000: 100 of 100 jobs: j0 0, j1 1, ") and problem.endswith(
        ", j19 19 and 80 more"
    )
