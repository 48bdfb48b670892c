"""The weights of two experts: their boundary, a checkpoint for each, and the records that say which one is which."""

import re
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec, PrecomputeManifest
from pusa.manifest.network import ExpertCheckpoints
from pusa.system.files import read_object, write_json, write_text
from pusa.system.strict import list_problems
from pusa.weights.load import load_part
from pusa.weights.model import Model
from pusa.weights.resolve import boundary, locate_config, locate_part, require_model, require_one_space
from pusa.weights.tensors import read_file
from pusa.weights.write import config_of, write_transformer
from tests.helpers.small_wan import new_wan_transformer, write_wan_2_1, write_wan_2_2_a14b

EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_wan_2_2_a14b(tmp_path_factory.mktemp("a14b"))


def spec_of(weights: Path, **keys) -> ModelSpec:
    return ModelSpec.model_validate({"backbone": "wan2.2-a14b", "weights": str(weights), **keys})


def put_checkpoint(folder: Path, part: str, **record) -> Path:
    """Write a fine-tuned transformer as a checkpoint holds it."""
    trained = new_wan_transformer(7)
    write_transformer(folder / part, trained.state_dict(), config_of(trained), {"latent_space": "dit", **record})
    return folder


# The boundary.


@pytest.mark.parametrize(
    ("stated", "expected"), [(0.875, 0.875), (0.9, 0.9), (0, 0.0), (1, 1.0), (None, 0.875), ("nothing", 0.875)]
)
def test_the_boundary_is_the_models_own_or_the_familys(tmp_path, stated, expected):
    index = {} if stated == "nothing" else {"boundary_ratio": stated}
    write_json(tmp_path / "model_index.json", index)
    assert boundary(spec_of(tmp_path)) == expected
    assert boundary(ModelSpec(backbone="wan2.1", weights=str(tmp_path))) is None
    (tmp_path / "model_index.json").unlink()
    assert boundary(spec_of(tmp_path)) == 0.875


@pytest.mark.parametrize("stated", ["-0.1", "1.5", "875", "true", '"0.875"', "[0.875]", "{}", "1e400", "NaN", "-1e400"])
def test_a_boundary_that_is_no_level_is_refused(weights, tmp_path, stated):
    made = shutil.copytree(weights, tmp_path / "a")
    write_text(made / "model_index.json", f'{{"boundary_ratio": {stated}}}')
    with pytest.raises(WeightsError, match=r"model_index\.json"):
        require_model(spec_of(made))


# Checkpoints.


@pytest.mark.parametrize(
    ("backbone", "checkpoint", "problem"),
    [
        ("wan2.2-a14b", "/runs/a", r"does not say which .* expected \{high: /runs/a\} or \{low: /runs/a\}"),
        ("wan2.2-a14b", {}, "names no checkpoint; expected high, low or both"),
        ("wan2.2-a14b", {"hihg": "/runs/a"}, r"checkpoint\.hihg: unknown key; did you mean 'high'"),
        ("wan2.2-a14b", {"high": 3}, r"checkpoint\.high: .*string"),
        ("wan2.2-a14b", 3, "checkpoint: .*string"),
        ("wan2.1", {"high": "/runs/a"}, "wan2.1 has one transformer; expected one name"),
        ("mochi", {"low": "/runs/a"}, "mochi has one transformer; expected one name"),
    ],
)
def test_checkpoints_are_named_by_expert_where_there_are_two(backbone, checkpoint, problem):
    with pytest.raises(ValidationError) as caught:
        ModelSpec.model_validate({"backbone": backbone, "weights": "hf:a/b", "checkpoint": checkpoint})
    (line,) = list_problems(caught.value, ModelSpec)
    assert re.search(problem, line), line


def test_a_checkpoint_stays_a_name_where_there_is_one_transformer():
    plain = ModelSpec(weights="hf:a/b", checkpoint="/runs/a")
    assert plain.model_dump(exclude_unset=True) == {"weights": "hf:a/b", "checkpoint": "/runs/a"}
    assert [plain.checkpoint_of(part) for part in (*EXPERTS, "vae")] == ["/runs/a", None, None]
    assert plain.with_checkpoint("transformer", "/runs/b").checkpoint == "/runs/b"


def test_paths_of_both_checkpoints_are_resolved(tmp_path):
    model = {"backbone": "wan2.2-a14b", "weights": "hf:a/b", "checkpoint": {"high": "RUN/x", "low": "y"}}
    made = PrecomputeManifest.model_validate({"model": model}).resolve_paths(tmp_path / "run", tmp_path / "manifests")
    assert made.model.checkpoint == ExpertCheckpoints(high=f"{tmp_path}/run/x", low=f"{tmp_path}/manifests/y")
    again = PrecomputeManifest.model_validate(made.model_dump(mode="json"))
    assert again.model == made.model
    assert made.model.with_checkpoint("transformer", "/z").checkpoint.low == f"{tmp_path}/manifests/y"


@pytest.mark.parametrize(("expert", "part"), [("high", "transformer"), ("low", "transformer_2")])
def test_a_checkpoint_replaces_its_expert_alone(weights, tmp_path, expert, part):
    checkpoint = put_checkpoint(tmp_path / "00000002", part, expert=expert, backbone="wan2.2-a14b")
    plain, tuned = spec_of(weights), spec_of(weights, checkpoint={expert: str(checkpoint)})
    require_model(tuned)
    changed = {
        name for name, found in Model(tuned, "cpu").fingerprints().items()
        if found != Model(plain, "cpu").fingerprints(name)[name]
    }  # fmt: skip
    assert changed == {part}
    assert locate_part(tuned, part).folder == locate_config(tuned, part).folder == checkpoint / part
    model = Model(tuned, "cpu")
    assert model.space_name == "dit"
    loaded = model.denoiser(EXPERTS.index(part)).state_dict()
    assert all((weight == loaded[name]).all() for name, weight in new_wan_transformer(7).state_dict().items())


@pytest.mark.parametrize(("expert", "part"), [("high", "transformer"), ("low", "transformer_2")])
def test_the_checkpoint_of_the_other_expert_is_refused(weights, tmp_path, expert, part):
    checkpoint = put_checkpoint(tmp_path / "00000002", part, expert=expert, backbone="wan2.2-a14b")
    other = {"high": "low", "low": "high"}[expert]
    for place in (checkpoint, checkpoint / part):
        with pytest.raises(WeightsError, match=f"has expert '{expert}'; the manifest has '{other}'"):
            require_model(spec_of(weights, checkpoint={other: str(place)}))


def test_a_checkpoint_without_a_record_may_be_either(weights, tmp_path):
    checkpoint = put_checkpoint(tmp_path / "made", "transformer")
    for expert in ("high", "low"):
        require_model(spec_of(weights, checkpoint={expert: str(checkpoint)}))
    both = put_checkpoint(checkpoint, "transformer_2", expert="low")  # a whole folder has each under its own name
    require_model(spec_of(weights, checkpoint={"high": str(both), "low": str(both)}))


def test_a_checkpoint_of_another_family_or_space_is_refused(weights, tmp_path):
    other = put_checkpoint(tmp_path / "other", "transformer", backbone="wan2.1")
    with pytest.raises(WeightsError, match=r"has backbone 'wan2\.1'; the manifest has 'wan2\.2-a14b'"):
        require_model(spec_of(weights, checkpoint={"low": str(other)}))
    vae = put_checkpoint(tmp_path / "vae", "transformer_2", latent_space="vae")
    with pytest.raises(WeightsError, match="has latent_space 'vae'; expected dit"):
        require_model(spec_of(weights, checkpoint={"low": str(vae)}))
    with pytest.raises(WeightsError, match="transformer has 'dit', transformer_2 has 'vae'; they must have the same"):
        require_one_space({"transformer": "dit", "transformer_2": "vae"})


def test_a_model_that_lacks_an_expert_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(WeightsError, match="has no transformer_2"):
        require_model(spec_of(write_wan_2_1(tmp_path)))


# The device.


def test_with_offload_one_part_is_on_the_device_and_without_it_all_stay(weights, monkeypatch):
    class Counted(Model):
        """`there` has the parts that were moved to the device and not away since."""

        def _on_device(self, part):
            module = super()._on_device(part)
            if not hasattr(module, "moved"):
                module.moved, plain = True, module.to
                module.to = lambda place: (there.discard if place == "cpu" else there.add)(part) or plain(place)
            there.add(part)
            return module

    def load(backbone, files, dtype, device):
        assert not (offload and there), "LoRAs are merged on the device, so the other parts must make room before"
        return load_part(backbone, files, dtype, device)

    monkeypatch.setattr("pusa.weights.model.load_part", load)
    for offload, expected in ((True, {"transformer_2"}), (False, {"vae", *EXPERTS})):
        there: set[str] = set()
        model = Counted(spec_of(weights, offload=offload), "cpu")
        _ = model.vae, model.denoiser(0)
        assert there == ({"transformer"} if offload else {"vae", "transformer"})
        _ = model.denoiser(1)
        assert there == expected


def test_the_small_models_experts_differ(weights):
    files = [weights / part / "diffusion_pytorch_model.safetensors" for part in EXPERTS]
    assert read_file(files[0])[0].keys() == read_file(files[1])[0].keys()
    assert files[0].read_bytes() != files[1].read_bytes()
    assert read_object(weights / "model_index.json")["boundary_ratio"] == 0.875
