"""What people of diffusers do with a pipeline: the documented example, a hub, other dtypes, offload, compilation."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MochiTransformer3DModel

from pusa.api.pipeline import Condition, PusaPipeline
from pusa.errors import ConditionError, WeightsError
from pusa.generate.sampling import sample_job
from pusa.manifest.models import ModelSpec
from pusa.tasks.text_to_video import TextToVideo
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN
from tests.helpers.hub_server import HubServer

CALL = {"num_frames": 7, "width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 1, "generator": 0}

BLACK = np.zeros((32, 32, 3), np.uint8)


def make(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", **CALL, output_type="latent").frames


def lora_of(transformer) -> dict[str, torch.Tensor]:
    width, layer = transformer.transformer_blocks[0].attn1.to_q.weight.shape[0], "transformer_blocks.0.attn1.to_q"
    pairs = {"A": torch.ones(2, width), "B": torch.ones(width, 2)}
    return {f"transformer.{layer}.lora_{side}.weight": tensor for side, tensor in pairs.items()}


def test_the_documented_example_makes_a_video():
    text = (Path(__file__).parents[2] / "manifests/README.md").read_text()
    code = text.split("### A diffusers pipeline")[1].split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["made"].frames[0].shape == (13, 64, 64, 3)


def test_a_pipeline_and_a_lora_are_loaded_from_a_hub(tmp_path):
    """In a process of its own: huggingface_hub reads the address when it is imported."""
    lora = BUILTIN / "tiny-wan-pusa/pytorch_lora_weights.safetensors"
    code = """
import sys
from pusa import PusaPipeline
made = []
for base, lora in (("org/tiny", "org/lora"), sys.argv[1:]):
    pipe = PusaPipeline.from_pretrained(base)
    pipe.load_lora_weights(lora)
    call = {"num_frames": 13, "width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 1, "generator": 0}
    made.append(pipe("a red circle", **call, output_type="latent").frames)
assert made[0].equal(made[1])
"""
    with HubServer(tmp_path / "hub") as server:
        files = [path for path in (BUILTIN / "tiny-wan").rglob("*") if path.is_file()]
        server.add("org/tiny", {str(path.relative_to(BUILTIN / "tiny-wan")): path.read_bytes() for path in files})
        server.add("org/lora", {lora.name: lora.read_bytes()})
        places = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1,localhost"}
        command = [sys.executable, "-c", code, "builtin:tiny-wan", "builtin:tiny-wan-pusa"]
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dtype_is_that_of_a_manifests_model(dtype):
    model = Model(ModelSpec(weights="builtin:tiny"), "cpu")
    model.dtype = dtype
    job = TextToVideo(id="a", prompt="a red circle", width=32, height=32, num_frames=7, steps=2, guidance=1)
    pipe = PusaPipeline.from_pretrained("builtin:tiny", dtype=dtype)
    assert pipe.dtype == dtype and torch.allclose(make(pipe)[0], sample_job(job, model), atol=1e-4)


def test_a_module_with_a_lora_is_offloaded():
    pipe = PusaPipeline.from_pretrained("builtin:tiny")
    plain = make(pipe)
    pipe.load_lora_weights(lora_of(pipe.transformer), "one")
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    changed = make(pipe)
    assert not torch.allclose(changed, plain, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(make(pipe), plain)


def test_a_transformer_with_loras_is_not_adopted():
    transformer = MochiTransformer3DModel.from_pretrained(BUILTIN / "tiny/transformer")
    transformer.load_lora_adapter(lora_of(transformer))
    with pytest.raises(WeightsError, match=r"other weights than a plain MochiTransformer3DModel: .* without LoRAs"):
        PusaPipeline.from_pretrained("builtin:tiny", transformer=transformer)


def test_a_compiled_transformer_is_used_as_it_is():
    pipe = PusaPipeline.from_pretrained("builtin:tiny")
    plain = make(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.allclose(make(pipe), plain, atol=1e-4)
    compiled = torch.compile(MochiTransformer3DModel.from_pretrained(BUILTIN / "tiny/transformer"), backend="eager")
    with pytest.raises(WeightsError, match="was compiled before"):
        PusaPipeline(**{**pipe.components, "transformer": compiled})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 33}, "width 33 is not a multiple of 16; the nearest is 32"),
        ({"num_frames": 8}, "num_frames 8 is not 6k"),
        ({"num_inference_steps": 0}, "num_inference_steps: "),
        ({"guidance_scale": 0.5}, "guidance_scale: "),
        ({"generator": -1}, "generator: "),
        ({"generator": [1, 2]}, "2 seeds or generators for 1 videos"),
        ({"generator": True}, "generator is True; expected a whole number"),
        ({"prompt": None}, "prompt is None; expected a text, or a list"),
        ({"prompt": []}, r"prompt is \[\]; expected"),
        ({"prompt": ["a", 3]}, r"prompt is \['a', 3\]; expected"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0; expected a whole number, 1 or more"),
        ({"num_frame": 7}, "unknown argument 'num_frame'; did you mean 'num_frames'?"),
        ({"latents": None, "image": 0}, r"image was given, .*: frames are given as conditions=\[Condition"),
        ({"conditions": 0}, "conditions is of type int; expected a list of Condition"),
        ({"noise_schedule": "cosine"}, "unknown noise schedule 'cosine'"),
        ({"output_type": "gif"}, "output_type is 'gif'; expected one of np, pil, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "allowed is latents"),
        ({"conditions": ["a.png"]}, r"conditions\[0\] is a str; expected"),
        ({"conditions": [Condition("a.png")]}, r"conditions\[0\]: frames is a str; .*load_image"),
        ({"conditions": [Condition(np.zeros((32, 32)))]}, r"frames is an array \(32, 32\)"),
        ({"conditions": [Condition(np.full((32, 32, 3), 2.0))]}, r"floats from 2 to 2; expected \[0, 1\]"),
        ({"conditions": [Condition(np.full((32, 32, 3), np.nan))]}, r"floats from nan to nan"),
        ({"conditions": [Condition(np.zeros((8, 32, 32, 3), np.uint8))]}, "the number of frames 8 is not 6k"),
        ({"conditions": [Condition(BLACK, position=2)]}, "allowed are -2..1"),
        ({"conditions": [Condition(BLACK, multiplier=1.5)]}, r"multiplier: got 1.5; expected"),
        ({"conditions": [Condition(BLACK, multiplier=[0.1, 0.2])]}, "2 multipliers for 1"),
        ({"conditions": [Condition(BLACK, take=1.5)]}, r"take is 1\.5; expected a latent frame"),
        ({"conditions": [Condition(BLACK, take=1)]}, "take 1 is outside the 1 latent frames"),
        ({"conditions": [Condition(torch.full((12, 2, 4, 4), torch.inf))]}, "not finite"),
        ({"conditions": [Condition(BLACK, position=p) for p in (1, -1)]}, "twice"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_clear_error(tiny, arguments, message):
    with pytest.raises(ConditionError, match=message):
        tiny(**{"prompt": "x", **CALL, **arguments})
