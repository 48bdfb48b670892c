"""Messages about a manifest's values name the place in the file, the value, and what is allowed."""

import pytest

from pusa.errors import ManifestError
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Full, Lora, Partial, Validation
from pusa.system.strict import MAX_PROBLEMS, models_in

METHODS = "full, partial or lora"


def messages_of(folder, text: str) -> list[str]:
    (folder / "m.yaml").write_text(text)
    with pytest.raises(ManifestError) as error:
        load_manifest(folder / "m.yaml", folder / "run")
    return [line.strip() for line in str(error.value).splitlines()[1:]]


WRONG = {
    "train: {method: lroa}": "train: unknown method 'lroa'; did you mean 'lora'? allowed are full, partial, lora",
    "train: {rank: 4}": f"train: has no `method`; expected a mapping with `method`: {METHODS}",
    "train: lora": f"train: expected a mapping with `method`: {METHODS} (given: 'lora')",
    "train: [lora]": f"train: expected a mapping with `method`: {METHODS} (given: ['lora'])",
    "train: {method: lora, rnk: 4}": "train.rnk: unknown key; did you mean 'rank'?",
    "train: {method: lora, lora: 4}": "train.lora: unknown key; known keys are alpha, method, rank, targets",
    "train: {method: full, names: [a]}": "train.names: unknown key; known keys are method",
    "train: {method: partial, names: [1]}": "train.names.0: Input should be a valid string (given: 1; put it in quotes",
    "parallel: 4": "parallel: expected a mapping with processes, context (given: 4)",
    "finetune: 4": "finetune: unknown key; known keys are",
}


@pytest.mark.parametrize("text, expected", WRONG.items(), ids=WRONG)
def test_a_message_names_the_place_in_the_file_and_what_is_allowed_there(tmp_path, text, expected):
    (line,) = messages_of(tmp_path, f'kind: finetune\nbase: {{weights: "builtin:tiny"}}\n{text}\n')
    assert line.startswith(expected)


def test_a_message_about_a_job_does_too(tmp_path):
    frames = "{0: {image: a, multipler: 0.1}, 1: a.png}"
    lines = messages_of(
        tmp_path,
        'kind: generate\nmodel: {weights: "builtin:tiny"}\njobs:\n'
        f"  - keyframes\n  - {{id: a, task: keyframes, frames: {frames}}}\n  - {{id: b, task: loop, loop: 1}}\n",
    )
    assert lines[0].startswith("jobs.0: expected a mapping with `task`: text_to_video, ")
    assert lines[1:3] == [
        "jobs.1.frames.0.multipler: unknown key; did you mean 'multiplier'?",
        "jobs.1.frames.1: expected a mapping with image, multiplier (given: 'a.png')",
    ]
    assert lines[3].startswith("jobs.2.loop: unknown key; ")


MANY = {
    "unknown keys": 'kind: generate\nmodel: {weights: "builtin:tiny"}\njobs: [a]\n'
    + "".join(f"key{i}: 1\n" for i in range(10_000)),
    "jobs of no task": 'kind: generate\nmodel: {weights: "builtin:tiny"}\njobs:\n'
    + "  - {task: x, frames: {0: 1}}\n" * 1000,
    "wrong values": 'kind: precompute\nmodel: {weights: "builtin:tiny"}\nclips: [' + "[1], " * 20_000 + "]",
    "a long key": 'kind: precompute\nmodel: {weights: "builtin:tiny"}\n? "' + "k" * 500_000 + '"\n: 1\n',
    "a long task": 'kind: generate\nmodel: {weights: "builtin:tiny"}\njobs: [{task: ' + "t" * 500_000 + "}]\n",
    "keys that steer": 'kind: precompute\nmodel: {weights: "builtin:tiny"}\n"\\e[2J\\u202e": 1\n',
}


@pytest.mark.parametrize("text", MANY.values(), ids=MANY)
def test_a_message_is_short_and_printable_whatever_the_manifest_holds(tmp_path, text):
    lines = messages_of(tmp_path, text)
    assert sum(map(len, lines)) < 30_000 and all(map(str.isprintable, lines))
    assert len(lines) < MAX_PROBLEMS or (lines[MAX_PROBLEMS].startswith("and ") and len(lines) == MAX_PROBLEMS + 1)


def test_models_are_found_in_the_order_of_their_declaration():
    assert models_in(FinetuneManifest.model_fields["train"].annotation) == [Full, Partial, Lora]


OLD_KEYS = {
    "decay: cosine": ("lr_schedule", "cosine"),
    "clip_norm: 0.5": ("max_grad_norm", 0.5),
    "recompute: 2": ("activation_checkpointing", 2),
    "probe: {clips: 3}": ("validation", Validation(clips=3)),
}


@pytest.mark.parametrize("text", OLD_KEYS)
def test_an_old_key_is_read_with_one_warning(tmp_path, caplog, text):
    (tmp_path / "m.yaml").write_text(f'kind: finetune\nbase: {{weights: "builtin:tiny"}}\n{text}\n')
    manifest = load_manifest(tmp_path / "m.yaml", tmp_path / "run").resolve_paths(tmp_path)
    old, (new, value) = text.partition(":")[0], OLD_KEYS[text]
    assert getattr(manifest, new) == value
    assert caplog.messages == [f"the key {old} is now called {new}; the next version will refuse {old}"]


def test_a_key_under_its_old_and_its_new_name_is_refused(tmp_path):
    text = 'kind: finetune\nbase: {weights: "builtin:tiny"}\ndecay: cosine\nlr_schedule: constant\n'
    (line,) = messages_of(tmp_path, text)
    assert line == (
        "manifest: decay and lr_schedule are both given; decay is the old name of lr_schedule, give lr_schedule only"
    )


def test_old_keys_are_neither_described_nor_suggested(tmp_path):
    (line,) = messages_of(tmp_path, 'kind: finetune\nbase: {weights: "builtin:tiny"}\nlr_shedule: cosine\n')
    assert line == "lr_shedule: unknown key; did you mean 'lr_schedule'?"
    assert FinetuneManifest.old_keys.keys().isdisjoint(FinetuneManifest.model_fields)
    assert set(FinetuneManifest.old_keys.values()) <= FinetuneManifest.model_fields.keys()
