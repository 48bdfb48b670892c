"""Properties of expansion, over any files, sweeps and values."""

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pusa.manifest.expansion import MAX_PART, expand, id_part, with_value_at
from pusa.manifest.models import GenerateManifest
from pusa.system.names import nfc
from pusa.tasks.base import is_id
from tests.manifest.conftest import FREE_NAMES, ID

# Names that a file can have; a leading dot would hide it from a glob.
STEMS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30).filter(
    lambda name: not name.startswith(".") and len(name.encode()) < 200
)
SWEEPS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.lists(st.integers(0, 2**40), min_size=1, max_size=4, unique=True),
        "multiplier": st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True),
        "steps": st.lists(st.integers(1, 1000), min_size=1, max_size=3, unique=True),
        "prompt": st.lists(st.text(max_size=60), min_size=1, max_size=3, unique_by=lambda text: alike(text)),
    },
)


def alike(text: str) -> str:
    """Return what is equal for texts that count as equal in ids."""
    return nfc(nfc(text).casefold())


def expanded(jobs: list[dict], folder: Path):
    return expand({"kind": "generate", "model": {}, "jobs": jobs}, {"folder": folder, "run_dir": folder})


@FREE_NAMES
@settings(max_examples=25)
@given(stems=st.lists(STEMS, min_size=1, max_size=5, unique_by=alike), sweep=SWEEPS, before=st.integers(0, 3))
def test_a_glob_and_a_sweep_make_every_combination_once_with_a_valid_id_of_its_own(stems, sweep, before):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stem in stems:
            (folder / f"{stem}.png").touch()
        grid = {"id": "g", "task": "image_to_video", "image": "*.png", **({"sweep": sweep} if sweep else {})}
        others = [{"id": f"other{i}", "task": "text_to_video"} for i in range(before)]
        result = expanded([*others, grid], folder)
    assert not result.problems and not result.partial
    jobs = result.data["jobs"][before:]
    assert len(jobs) == len(stems) * math.prod(map(len, sweep.values()))
    assert result.data["jobs"][:before] == others
    assert all(is_id(job["id"]) and ID.fullmatch(job["id"]) for job in jobs)
    assert len({job["id"].casefold() for job in jobs}) == len(jobs)
    combinations = {(job["image"], *(repr(job[key]) for key in sweep)) for job in jobs}
    assert len(combinations) == len(jobs)
    assert not any(key in job for job in jobs for key in ("sweep", "prompt_file"))
    assert all(job[key] in values for job in jobs for key, values in sweep.items())


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_as_written_leads_from_an_expanded_job_back_to_the_job_in_the_file(counts):
    jobs = [
        {"id": f"j{i}", "task": "text_to_video", "prompt": "a", "sweep": {"seed": list(range(count))}}
        for i, count in enumerate(counts)
    ]
    result = expanded(jobs, Path("/none"))
    origins = [i for i, count in enumerate(counts) for _ in range(count)]
    assert result.origins == origins
    for place, origin in enumerate(origins):
        assert result.data["jobs"][place]["id"].startswith(f"j{origin}-seed")
        assert result.as_written(("jobs", place)) == ("jobs", origin)
        # pydantic puts the task's name after the job's place.
        assert result.as_written(("jobs", place, "text_to_video", "prompt")) == (
            "jobs", origin, "text_to_video", "prompt",
        )  # fmt: skip
        swept = result.as_written(("jobs", place, "text_to_video", "seed"))
        assert swept == ("jobs", origin, "sweep", "seed")
    assert result.as_written(("model", "weights")) == ("model", "weights")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.lists(SCALARS | st.lists(st.integers() | st.text(), max_size=4), max_size=6))
def test_parts_of_an_id_are_short_clean_and_differ_where_the_values_do(values):
    parts = [id_part(value) for value in values]
    assert all(len(part) <= MAX_PART and (not part or is_id(f"a{part}")) for part in parts)
    texts = [nfc(value) for value in values if isinstance(value, str)]
    assert len({id_part(text) for text in texts}) == len(set(texts))


NESTED = st.recursive(
    st.text(), lambda inner: st.lists(inner, min_size=1) | st.dictionaries(st.text(), inner, min_size=1), max_leaves=8
)


@given(NESTED, st.data())
def test_a_new_value_goes_to_its_place_and_nothing_else_changes(value, data):
    place, inner = (), value
    while isinstance(inner, list | dict) and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(list(range(len(inner))) if isinstance(inner, list) else sorted(inner)))
        place, inner = (*place, key), inner[key]
    before = repr(value)
    changed = with_value_at(value, place, "new")
    assert repr(value) == before
    for key in place:
        changed = changed[key]
    assert changed == "new"
    assert with_value_at(with_value_at(value, place, "new"), place, inner) == value


@pytest.mark.parametrize("seeds", [1, 7])
def test_an_expanded_manifest_is_not_expanded_again(seeds, tmp_path):
    result = expanded([{"id": "a", "task": "text_to_video", "sweep": {"seed": list(range(seeds))}}], tmp_path)
    data = {**result.data, "model": {"weights": "builtin:tiny"}}
    again = expand(data, {"folder": tmp_path, "run_dir": tmp_path})
    assert again.data == data
    assert len(GenerateManifest.model_validate(data).jobs) == seeds
