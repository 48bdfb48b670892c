import re

import pytest
import torch

from flows.commands import main
from pusa.backbones.dry_run import GIB
from pusa.finetune.plan import report
from pusa.manifest.models import Bucket, FinetuneManifest
from tests.helpers.synthetic_tables import write_synthetic

SHAPES = [Bucket(width=64, height=64, num_frames=frames) for frames in (7, 31)]


def manifest(**settings) -> FinetuneManifest:
    return FinetuneManifest.model_validate({"base": {"weights": "builtin:tiny"}, "batch_size": 4, **settings})


def lines(memory: float, **settings) -> list[str]:
    return list(report(manifest(**settings), SHAPES, torch.float32, int(memory * GIB)))


def test_each_shape_has_its_line_and_alternatives_are_left_out_where_it_fits():
    printed = lines(80)
    assert [line.split()[0] for line in printed if "fits into" in line] == ["64x64x7", "64x64x31"]
    assert "4 clips per step each, 4 at a time" in printed[0]
    assert not any("instead" in line for line in printed)
    assert "workspaces of kernels" in printed[-1]


def test_the_work_of_measuring_held_out_clips_is_named_as_a_share():
    assert not any("Held-out" in line for line in lines(80, validation={"held_out": 0.1}))
    validation = {"held_out": 0.1, "every": 30, "matrix_clips": 3, "levels": [0.3, 0.6]}
    (line,) = (line for line in lines(80, steps=100, validation=validation) if "Held-out" in line)
    # Steps 0, 30, 60, 90 and 100; the longest clips have six latent frames, so all patterns: 5 x 30 of 100 x 4 x 3.
    assert "5 measurements of at most 3 clips x 5 patterns x 2 levels = 30 forward passes, 12.5% of" in line


def test_alternatives_are_listed_with_their_memory_where_it_does_not_fit():
    memory = 0.03
    printed = lines(memory)
    start = next(i for i, line in enumerate(printed) if line.startswith("What may be set instead, for 64x64x31"))
    others = {line.split(" into 0.0  ")[1]: line for line in printed[start + 1 : -1]}
    cheaper = ["activation_checkpointing: 1", "activation_checkpointing: 1, micro_batch_size: 1"]
    assert {*cheaper, "activation_checkpointing: 1, 4 processes"} <= set(others)
    assert any("train: lora" in change for change in others)
    for line in others.values():
        assert ("does NOT fit" in line) == (float(line.split()[0]) > memory)
    # Processes that cannot divide the four clips evenly are not offered.
    assert not any("8 processes" in change and "context" not in change for change in others)


def run(tmp_path, capsys, *more):
    path = tmp_path / "it.yaml"
    path.write_text("kind: finetune\nbase: {weights: 'builtin:tiny'}\nbatch_size: 4\n")
    code = main(["plan", str(path), "--run-dir", str(tmp_path / "run"), *more])
    return code, *capsys.readouterr()


def test_the_command(tmp_path, capsys):
    code, out, _ = run(tmp_path, capsys, "--size", "64x64", "--frames", "7", "--gpus", "2", "--gpu-memory", "80")
    assert code == 0 and "bfloat16" in out and "2 processes" in out
    assert re.search(r"^64x64x7 .* fits into 80.0$", out, re.MULTILINE)


def test_the_shapes_come_from_the_table(tmp_path, capsys):
    write_synthetic(tmp_path / "run/latents", {"64x32x7": 2, "32x64x13": 1})
    code, out, _ = run(tmp_path, capsys)
    assert code == 0 and re.findall(r"^\d+x\d+x\d+", out, re.MULTILINE) == ["32x64x13", "64x32x7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "run/latents is not a latents table yet; give the shape of its clips: --size WxH --frames N"),
        (["--size", "64x64"], "--size and --frames go together"),
        (["--size", "64x64", "--frames", "20000"], "num_frames"),
        (["--size", "60x64", "--frames", "7"], "width 60 is not a multiple of 16"),
        (["--size", "64x64", "--frames", "7", "--gpus", "3"], "batch_size is 4; it must be a multiple of 3"),
    ],
)
def test_plans_that_are_not_possible_are_refused(tmp_path, capsys, options, message):
    code, _, err = run(tmp_path, capsys, *options)
    assert code == 1 and message in err
