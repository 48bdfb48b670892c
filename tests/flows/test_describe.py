"""`pusa describe`: every bound of a number is told, and alternatives in the order in which they are declared."""

import re

import pytest

from flows.commands.describe import describe
from pusa.manifest.models import KINDS
from pusa.registry import find
from pusa.tasks import TASKS

LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
MODELS = {**KINDS, **{name: find(TASKS, name, "task") for name in TASKS}}


def rows(text: str) -> dict[str, str]:
    """What is said of each key, wherever it is one."""
    lines = re.sub(r"\n {22,}(?! *\w+  )", " ", text).splitlines()
    found: dict[str, str] = {}
    for line in lines:
        key, _, said = line.strip().partition(" ")
        found[key] = f"{found.get(key, '')} {said.strip()};"
    return found


def bounds(schema: dict) -> list[float]:
    """Those of a field itself, of what it may be instead, and of each of several."""
    inner = [*schema.get("anyOf", ()), schema.get("items", {})]
    return [schema[name] for name in LIMITS if name in schema] + [n for part in inner if part for n in bounds(part)]


@pytest.mark.parametrize("name", MODELS)
def test_every_bound_is_told(name):
    schema, said = MODELS[name].model_json_schema(), rows(describe(name))
    models = [schema] if name in TASKS else [schema, *schema.get("$defs", {}).values()]
    checked = 0
    for model in models:
        for key, field in model.get("properties", {}).items():
            for bound in bounds(field) if key in said else ():
                assert re.search(rf"(?<![\d.]){bound:.0f}(?![\d.])", said[key]), (key, bound, said[key])
                checked += 1
    assert checked > 5


@pytest.mark.parametrize(
    "name, key, said",
    [
        ("finetune", "rank", "1 to 4096; default 64"),
        ("finetune", "max_grad_norm", "above 0; default 1.0"),
        ("finetune", "learning_rate", "above 0 to 1; default 1e-05"),
        ("finetune", "warmup_steps", "0 or more; default 0"),
        ("finetune", "ema_decay", "0 to below 1; default 0.0"),
        ("image_to_video", "multiplier", "; 0 to 1;"),
        ("transition", "end_frames", "below 0; default [-3, -2, -1]"),
    ],
)
def test_bounds_are_short(name, key, said):
    assert said in rows(describe(name))[key]


def test_alternatives_are_in_the_order_of_their_declaration():
    assert re.findall(r"method: (\w+)", describe("finetune")) == ["full", "partial", "lora"]
