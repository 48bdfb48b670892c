"""Numbers of manifests: they are decimal, and nothing else becomes a number by accident."""

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pusa.errors import ManifestError
from pusa.finetune.recipe import with_overrides
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.parsing import parse_yaml
from pusa.tasks.base import MAX_PROMPT
from tests.manifest.conftest import ids

FINETUNE = FinetuneManifest(base={"weights": "builtin:tiny"})
AS_WRITTEN = [
    "0x1F", "0o17", "0b1", "1_000", "1_0.5", "1:30", "1:30.5", "190:20:30", "1.2.3", "1,5", "10L", "1e", "\u0667", "½",
]  # fmt: skip
NUMBERS = {
    "007": 7, "008": 8, "010": 10, "-010": -10, "+1": 1, "00": 0, "0777": 777, "1e3": 1000.0, "12e03": 12000.0,
    "1E+2": 100.0, "1e-5": 1e-5, ".5": 0.5, "-.5": -0.5, "1.": 1.0, "007.50": 7.5, "!!int '010'": 10, "!!float 3": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_decimal(text):
    (value,) = parse_yaml(f"[{text}]", "here")
    assert value == NUMBERS[text] and type(value) is type(NUMBERS[text])


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_any_other_way_to_write_a_number_is_text_and_refused_where_a_number_is_expected(load, refused, text):
    assert parse_yaml(f"[{text!r}]", "here") == parse_yaml(f"- {text}", "here") == [text]
    assert load(f"id: a\n    task: text_to_video\n    prompt: {text}")[0].prompt == text
    for key in ("seed", "fps"):
        (line,) = refused(f"{{id: a, task: text_to_video, {key}: '{text}'}}")
        assert re.match(rf"jobs\.0\.{key}: Input should be a valid \w+ \(given: {text!r}, which is text; numbers", line)


@given(st.floats(allow_nan=False) | st.integers(-(10**30), 10**30))
def test_numbers_that_python_or_yaml_write_are_read_as_they_are(number):
    assert parse_yaml(f"[{number!r}]", "here") == [number] or number in (float("inf"), float("-inf"))
    assert parse_yaml(yaml.safe_dump([number]), "here") == [number]


def test_the_seeds_of_a_sweep_are_those_that_were_written(load):
    jobs = load("{id: s, task: text_to_video, prompt: x, sweep: {seed: [007, 008, 010, 011]}}")
    assert [(job.id, job.seed) for job in jobs] == [(f"s-seed{seed}", seed) for seed in (7, 8, 10, 11)]


REFUSED = {
    "seed: -1": "seed: Input should be greater than or equal to 0 (given: -1)",
    "seed: 9223372036854775808": "seed: Input should be less than 9223372036854775808",
    "seed: 7.0": "seed: Input should be a valid integer (given: 7.0)",
    "seed: 1e3": "seed: Input should be a valid integer (given: 1000.0)",
    "seed: '7'": "seed: Input should be a valid integer (given: '7', which is text; numbers are decimal",
    "seed: yes": "seed: seed is true, which is neither a number nor text",
    "seed: 2024-01-01": "seed: Input should be a valid integer (given: datetime.date(2024, 1, 1))",
    "seed: [1]": "seed: Input should be a valid integer (given: [1])",
    "fps: .inf": "fps: Input should be a finite number",
    "fps: 1e999": "fps: Input should be",
    "prompt: 007": "prompt: Input should be a valid string (given: 7; put it in quotes to make it text",
    "prompt: 2024-01-01": "prompt: Input should be a valid string (given: datetime.date(2024, 1, 1); put it in quotes",
    "prompt: !!int 0x1F": "",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_value_of_another_type_is_refused_with_its_place(load, setting):
    message = f"jobs.0.{REFUSED[setting]}" if REFUSED[setting] else "'0x1F' is not a decimal number"
    with pytest.raises(ManifestError) as error:
        load(f"{{id: a, task: text_to_video, {setting}}}")
    assert message.replace("jobs.0.seed: seed is", "jobs.0: seed is") in str(error.value)


@pytest.mark.parametrize("given_frames", ["[yes]", "[0.0]", "['0']", "[0, 0x1]", "[1:30]"])
def test_the_numbers_of_a_list_are_numbers_too(refused, given_frames):
    (line,) = refused(f"{{id: a, task: completion, video: a.mp4, given: {given_frames}}}")
    assert re.match(r"jobs\.0\.given\.\d: Input should be a valid integer", line)


@pytest.mark.parametrize("text", ["0_1..0.4", "0:1..1", "0x0..1", "\u0660..1", "..1", "0.."])
def test_a_ramp_is_of_decimal_numbers(refused, text):
    (line,) = refused(f"{{id: a, task: completion, video: a.mp4, given: [0], multipliers: '{text}'}}")
    assert "expected a number in [0, 1], a list of them, or a ramp" in line


def test_a_zero_at_the_front_of_text_is_kept(load, tmp_path):
    (job,) = load("{id: '007', task: image_to_video, image: 007.png, prompt: '010'}")
    assert (job.id, job.image.name, job.prompt) == ("007", "007.png", "010")
    (tmp_path / "in").mkdir()
    for name in ("001.png", "01.png", "010.png"):
        (tmp_path / "in" / name).touch()
    jobs = load("{id: g, task: image_to_video, image: 'in/*.png'}")
    assert ids(jobs) == ["g-001", "g-01", "g-010"]


def test_integer_keys_may_be_text_as_in_json_but_not_in_other_ways(load, refused):
    frames = {"0": {"image": "a.png"}, "-1": {"image": "b.png"}}
    (job,) = load(json.dumps({"id": "k", "task": "keyframes", "frames": frames}))
    assert list(job.frames) == [0, -1]
    for key in ("00", "0x1", "1:30", "1_0", "+1", "-0"):
        (line,) = refused(json.dumps({"id": "k", "task": "keyframes", "frames": {key: {"image": "a.png"}}}))
        assert "valid integer" in line and key in line
    (line,) = refused("{id: k, task: keyframes, frames: {0: {image: a.png}, '0': {image: b.png}}}")
    assert line == "jobs.0.frames: 0 is a key twice, as a number and as text"


def test_an_override_is_read_as_a_manifest_is():
    assert with_overrides(FINETUNE, {"learning_rate": "1e-4", "warmup_steps": "010"}).learning_rate == 1e-4
    assert with_overrides(FINETUNE, {"warmup_steps": "010"}).warmup_steps == 10
    for text in ("1:30", "0x10", "1_0", "'10'", "1e1", "yes"):
        with pytest.raises(ManifestError, match=r"--override .*warmup_steps"):
            with_overrides(FINETUNE, {"warmup_steps": text})
    with pytest.raises(ManifestError, match=r"--override levels=&a .* uses a YAML alias"):
        with_overrides(FINETUNE, {"levels": "&a [*a]"})


def test_a_number_that_python_cannot_convert_is_text():
    (value,) = parse_yaml("[" + "9" * MAX_PROMPT + "]", "here")
    assert value == "9" * MAX_PROMPT


@pytest.mark.parametrize("text", ["a: !!bool maybe", "a: !!timestamp abc", "? !!seq x\n: 1", "? !!map x\n: 1"])
def test_a_tag_that_does_not_fit_its_value_is_not_yaml(text):
    with pytest.raises(ManifestError, match=r"a\.yaml"):
        parse_yaml(text, "a.yaml")
