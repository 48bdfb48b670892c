"""`pusa describe`: every key is named, every bound of a number is given, and alternatives keep their order."""

import re

import pytest

from flows.commands import main
from flows.commands.describe import describe
from pusa.backbones import all_families
from pusa.manifest.models import KINDS
from pusa.registry import find
from pusa.tasks import TASKS

LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
MODELS = {**KINDS, **{name: find(TASKS, name, "task") for name in TASKS}}


def rows(text: str) -> dict[str, str]:
    """Return the text of each key, joined where several mappings have the key."""
    lines = re.sub(r"\n {22,}(?! *\w+  )", " ", text).splitlines()
    texts: dict[str, str] = {}
    for line in lines:
        key, _, text = line.strip().partition(" ")
        texts[key] = f"{texts.get(key, '')} {text.strip()};"
    return texts


def bounds(schema: dict) -> list[float]:
    """Return the bounds of a field, of its alternatives and of its items."""
    inner = [*schema.get("anyOf", ()), schema.get("items", {})]
    return [schema[name] for name in LIMITS if name in schema] + [n for part in inner if part for n in bounds(part)]


@pytest.mark.parametrize("name", MODELS)
def test_every_bound_is_given(name):
    schema, texts = MODELS[name].model_json_schema(), rows(describe(name))
    models = [schema] if name in TASKS else [schema, *schema.get("$defs", {}).values()]
    checked = 0
    for model in models:
        for key, field in model.get("properties", {}).items():
            for bound in bounds(field) if key in texts else ():
                assert re.search(rf"(?<![\d.]){bound:.0f}(?![\d.])", texts[key]), (key, bound, texts[key])
                checked += 1
    assert checked > 5


@pytest.mark.parametrize(
    "name, key, text",
    [
        ("finetune", "rank", "1 to 4096; default 64"),
        ("finetune", "max_grad_norm", "above 0 to 1000000000; default 1.0"),
        ("finetune", "learning_rate", "above 0 to 1; default 1e-05"),
        ("finetune", "warmup_steps", "0 to 1000000000; default 0"),
        ("finetune", "ema_decay", "0 to below 1; default 0.0"),
        ("image_to_video", "multiplier", "; 0 to 1;"),
        ("transition", "end_frames", "below 0; default [-3, -2, -1]"),
    ],
)
def test_bounds_are_short(name, key, text):
    assert text in rows(describe(name))[key]


def test_alternatives_are_in_the_order_of_their_declaration():
    assert re.findall(r"method: (\w+)", describe("finetune")) == ["full", "partial", "lora"]


@pytest.mark.parametrize("task", TASKS)
def test_describe_names_every_key_of_a_task(task, capsys):
    assert main(["describe", task]) == 0
    out = capsys.readouterr().out
    for key in find(TASKS, task, "task").model_fields:
        assert key == "task" or (f"\n  {key} " in out and find(TASKS, task, "task").model_fields[key].description)
    assert "\n  seed " in out.partition("for every task:")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_describe_names_every_key_of_a_manifest(kind, capsys):
    assert main(["describe", kind]) == 0
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if line.strip()}
    assert set(KINDS[kind].model_fields) - {"kind"} <= named


def test_describe_lists_the_allowed_names(capsys):
    assert main(["describe", "loopy"]) == 1
    assert (
        "unknown name 'loopy'; allowed are ingest, precompute, finetune, generate, text_to_video"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["generate", *TASKS])
def test_describe_shows_the_defaults_of_every_backbone(name):
    found = rows(describe(name).partition("defaults of other backbones")[2])
    for family in all_families()[1:]:
        assert f"width {family.job.width}" in found[family.name] and f"steps {family.job.steps}" in found[family.name]
