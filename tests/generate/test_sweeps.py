"""Sweeps are found by the ids that a manifest's expansion makes, and nothing else looks like one."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pusa.generate.sweeps import find_grids
from pusa.manifest.expansion import expand
from pusa.manifest.models import GenerateManifest

SWEPT = {
    "seed": st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    "guidance": st.lists(st.sampled_from([1, 1.5, 3, 6.25]), min_size=1, max_size=3, unique=True),
    "prompt": st.lists(st.text(max_size=50), min_size=1, max_size=3, unique=True),
    "noise_schedule": st.just(["linear_quadratic"]),
    "exact": st.just([False, True]),
    "multiplier": st.lists(st.sampled_from([0, 0.2, 1e-5, 1]), min_size=1, max_size=3, unique=True),
}

CONTEXT = {"folder": Path("/manifests"), "run_dir": Path("/run")}


def jobs_of(*entries: dict) -> dict[str, dict]:
    """Return the settings of each job of a manifest as its record has them."""
    data = {"kind": "generate", "model": {"backbone": "mochi", "weights": "builtin:tiny"}, "jobs": list(entries)}
    expanded = expand(data, CONTEXT)
    assert not expanded.problems
    manifest = GenerateManifest.model_validate(expanded.data)
    return {job.id: json.loads(json.dumps(job.model_dump(), default=str)) for job in manifest.jobs}


def entry(id: str, **settings) -> dict:
    return {"id": id, "task": "text_to_video", **settings}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_sweep_of_a_manifest_is_one_grid_of_all_its_values(data):
    keys = data.draw(st.lists(st.sampled_from(sorted(SWEPT)), min_size=1, max_size=4, unique=True))
    sweep = {key: data.draw(SWEPT[key]) for key in keys}
    expanded = expand({"jobs": [{"id": "a", "task": "image_to_video", "image": "/x.png", "sweep": sweep}]}, {})
    if expanded.problems:  # two values with the same part of an id
        return
    jobs = {job["id"]: job for job in expanded.data["jobs"]}
    long = {key: values for key, values in sweep.items() if len(values) > 1}
    grids = find_grids(jobs)
    if any(len(id) == 120 for id in jobs):  # such ids were cut, and cannot be read
        return
    assert len(grids) == (len(jobs) > 1)
    for grid in grids:
        assert {axis.key: list(axis.values) for axis in grid.axes} == long
        assert set(grid.ids.values()) == set(jobs)
        for places, id in grid.ids.items():
            for axis, place in zip(grid.axes, places, strict=True):
                assert jobs[id][axis.key] == axis.values[place]


def test_the_settings_of_records_give_the_same_grid(tmp_path):
    jobs = jobs_of(
        {
            "id": "grid", "task": "image_to_video", "image": str(tmp_path / "surf.png"), "prompt": "a boat",
            "sweep": {"multiplier": [0, 0.2], "seed": [1, 2], "noise_schedule": ["linear_quadratic"]},
        },
        entry("alone"),
    )  # fmt: skip
    (grid,) = find_grids(jobs)
    assert grid.base == "grid" and [axis.key for axis in grid.axes] == ["multiplier", "seed"]
    assert grid.ids[1, 0] == "grid-multiplier0.2-seed1-noise_schedulelinear_quadratic"


def test_swept_clips_are_an_axis(tmp_path):
    clips = [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    jobs = jobs_of({"id": "x", "task": "completion", "given": [0], "sweep": {"video": clips}})
    (grid,) = find_grids(jobs)
    assert list(grid.ids.values()) == ["x-videoa", "x-videob"] and grid.axes[0].values == tuple(clips)


@pytest.mark.parametrize(
    "entries",
    [
        [entry("a-seed1", seed=1)],  # one is no grid
        [entry("a-seed1", seed=2), entry("a-seed2", seed=1)],  # ids that say something else
        [entry("a-seed1", seed=1), entry("a-seed2", seed=2, prompt="another")],  # two jobs that differ elsewhere
        [entry("seed1", seed=1), entry("seed2", seed=2)],  # no base
        [entry("a-seed01", seed=1), entry("a-seed02", seed=2)],  # not as a sweep writes a value
        [entry("a-frames1"), entry("a-frames2")],
    ],
)
def test_what_is_no_sweep_stays_cards(entries):
    assert find_grids(jobs_of(*entries)) == []


def test_a_grid_lacks_no_value():
    jobs = jobs_of(*(entry(f"a-seed{s}-steps{n}", seed=s, steps=n) for s, n in ((1, 8), (1, 9), (2, 8))))
    (grid,) = find_grids(jobs)
    assert (grid.base, [*grid.ids.values()]) == ("a-seed1", ["a-seed1-steps8", "a-seed1-steps9"])


def test_an_id_that_can_be_read_in_two_ways_is_in_the_larger_grid():
    swept = {"prompt": ["x-seed1", "y-seed1", "z"]}
    jobs = jobs_of(entry("a", seed=1, sweep=swept))
    (grid,) = find_grids(jobs)
    assert [axis.key for axis in grid.axes] == ["prompt"] and len(grid.ids) == 3


def test_each_file_of_a_glob_has_a_grid_and_no_job_is_in_two(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").touch()
    jobs = jobs_of({"id": "pets", "task": "image_to_video", "image": f"{tmp_path}/*.png", "sweep": {"seed": [1, 2]}})
    grids = find_grids(jobs)
    assert [grid.base for grid in grids] == ["pets-cat", "pets-dog"]
    members = [id for grid in grids for id in grid.ids.values()]
    assert sorted(members) == sorted(jobs)


def test_settings_of_any_shape_are_no_sweep():
    odd = {"seed": {"a": 1}, "prompt": [[1]], "steps": None, "task": ["text_to_video"], 5: 1}
    assert find_grids({"a-seed1": odd, "a-seed2": {**odd, "task": "text_to_video", "seed": 10**5000}}) == []
