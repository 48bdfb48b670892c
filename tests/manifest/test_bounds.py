"""Values of absurd size: every number of a manifest has bounds, and what is refused is said in one short sentence."""

from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pusa.errors import ManifestError
from pusa.manifest import loading, parsing
from pusa.manifest.loading import read_manifest
from pusa.manifest.models import KINDS
from pusa.registry import find
from pusa.system.strict import models_in
from pusa.tasks import TASKS

MODELS = [*KINDS.values(), *(find(TASKS, name, "task") for name in TASKS)]


def numbers_in(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the constraints of each number in the annotation of a field."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        flat = [part for item in more for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return numbers_in(inner, (*metadata, *flat))
    if annotation in (int, float):
        return [metadata]
    inner = () if get_origin(annotation) is Literal else get_args(annotation)
    kept = metadata if get_origin(annotation) not in (tuple, dict) else ()
    return [found for part in inner for found in numbers_in(part, kept)]


def all_models(models: list[type[BaseModel]]) -> set[type[BaseModel]]:
    inner = [
        inner for model in models for field in model.model_fields.values() for inner in models_in(field.annotation)
    ]
    return {*models, *(all_models(inner) if inner else ())}


def test_every_number_of_every_manifest_has_bounds():
    fields = [(m, name, field) for m in all_models(MODELS) for name, field in m.model_fields.items()]
    found = [(m.__name__, name, constraints) for m, name, field in fields if name not in ("multipliers",)
             for constraints in numbers_in(field.annotation, tuple(field.metadata))]  # fmt: skip
    assert len(found) > 50
    low, high = (annotated_types.Ge, annotated_types.Gt), (annotated_types.Le, annotated_types.Lt)
    for model, name, constraints in found:
        for kinds in (low, high):
            assert any(isinstance(constraint, kinds) for constraint in constraints), (model, name, kinds)


HUGE = {
    "digits": "1" * 4000, "more digits": "1" * 100_000, "infinite": "1e400", "infinity": ".inf", "nan": ".nan",
    "float": "1e300", "negative": "-1e300", "text": "x" * 50_000, "list": f"[{'1,' * 3000}]",
    "deep": "[" * 19 + "]" * 19, "date": "9999-12-31", "year": "99999-01-01", "time": "2001-12-14t21:59:43.10-99:00",
    "binary": "!!binary " + "A" * 40_000, "set": "!!set {a, b}", "escape": '"\\e[2J\\u202e"', "tag": "!x 1",
    "omap": "!!omap [a: 1]", "pairs": "!!pairs [a: 1, a: 2]", "merge": "{<<: {steps: 1}}", "null": "~",
}  # fmt: skip
KEYS = {
    "generate": ["model", "defaults", "jobs", "jobs: [{{id: a, task: loop, image: {}}}]#", "defaults: {{seed: {}}}#"],
    "finetune": ["steps", "levels", "density", "train", "latents", "train: {{method: lora, rank: {}}}#", "seed"],
    "ingest": ["source", "clips", "limits: {{source_seconds: {}}}#", "file_column", "clips: {{fps: {}}}#", "backbone"],
    "precompute": ["unused_days", "batch_size", "clips", "dtype", "model: {{weights: {}}}#"],
}
JOB_KEYS = ["id", "seed", "prompt", "width", "noise_schedule", "background", "multipliers", "first_frame", "sweep",
            "sweep: {{seed: [{}]}}#", "prompt_file", "given", "video", "preset", "task", "{}"]  # fmt: skip


def assert_short_problems(tmp_path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    try:
        problems = read_manifest(tmp_path / "m.yaml", tmp_path).problems
    except ManifestError as error:
        problems = [str(error)]
    assert all(len(problem) < 3000 for problem in problems), max(problems, key=len)[:300]


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_huge_and_odd_values_end_in_short_sentences(tmp_path, value):
    for kind, keys in KEYS.items():
        for key in keys:
            line = key.format(value) if "{" in key else f"{key}: {value}"
            assert_short_problems(tmp_path, f"kind: {kind}\n{line}\n")
    for key in JOB_KEYS:
        line = key.format(value) if "{" in key else f"{key}: {value}"
        start = "" if key == "task" else "task: extension\n    "
        assert_short_problems(
            tmp_path, f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\njobs:\n  - {start}{line}\n'
        )


def test_more_values_than_allowed_are_refused_before_they_are_read(tmp_path, monkeypatch):
    (tmp_path / "m.yaml").write_text("kind: generate\njobs:\n- [1, 2, 3]\n- [4, 5, 6]\n")
    monkeypatch.setattr(parsing, "MAX_VALUES", 12)
    with pytest.raises(ManifestError, match=r"m\.yaml has more than 12 keys and values by line 4; split it$"):
        read_manifest(tmp_path / "m.yaml", tmp_path)


def test_more_jobs_than_allowed_are_refused_before_they_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "MAX_JOBS", 9)  # the real number takes seconds to be parsed
    (tmp_path / "m.yaml").write_text("kind: generate\njobs: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n")
    with pytest.raises(ManifestError, match=r"m\.yaml: jobs has 10 entries; allowed are 9$"):
        read_manifest(tmp_path / "m.yaml", tmp_path)
