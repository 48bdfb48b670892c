"""With `offload`, a chunk of jobs moves the parts of the model phase by phase, however many jobs it has."""

import numpy as np
import pytest

from pusa.generate.stage import generate
from pusa.manifest.models import ModelSpec
from pusa.video.media import write_image
from pusa.weights.model import Model
from tests.helpers.stub_model import manifest_of

OFFLOADED = ModelSpec(weights="builtin:tiny", offload=True)


class CountedModel(Model):
    """The tiny model; `moves` has a list for each chunk: the parts that came to the device, in order."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, "cpu")
        self.moves: list[list[str]] = [[]]
        self.there = ""  # the part on the device

    def _on_device(self, part):
        if part != self.there:
            self.moves[-1].append(part)
            self.there = part
        return super()._on_device(part)

    def step(self, name, call):
        """Make a chunk."""
        self.moves.append([])
        return call()


def moves_of(run, jobs, **defaults) -> list[list[str]]:
    """Make all jobs, none in a batch with others, and return the moves of each chunk that moved something."""
    model = CountedModel(OFFLOADED)
    manifest = manifest_of(*jobs, **defaults).model_copy(update={"model": OFFLOADED, "batch_tokens": 0})
    assert len(generate(manifest, run, lambda spec: model, step=model.step).made) == len(jobs)
    return [moves for moves in model.moves if moves]


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_each_part_is_moved_once_for_each_chunk(tmp_path, count):
    jobs = [{"id": f"j{i}", "prompt": f"prompt {i // 2}", "seed": i, "guidance": 3} for i in range(count)]
    first, *others = moves_of(tmp_path, jobs)
    assert first == ["text_encoder", "transformer", "vae"]  # one job, which shows how long the others take
    assert 1 <= len(others) <= count // 50 + 1
    assert all(chunk == ["text_encoder", "transformer", "vae"] for chunk in others)


def test_inputs_are_encoded_together_and_cost_one_more_move(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", np.full((32, 32, 3), 30 * ord(name) % 256, np.uint8))
    jobs = [{"id": f"j{i}", "prompt": "a ball"} for i in range(3)]
    jobs += [
        {"id": f"k{i}", "task": "image_to_video", "prompt": f"{i}", "image": tmp_path / f"{'ab'[i % 2]}.png"}
        for i in range(4)
    ]
    first, second = moves_of(tmp_path / "run", jobs)
    assert first == ["text_encoder", "transformer", "vae"]
    assert second == ["text_encoder", "vae", "transformer", "vae"]
