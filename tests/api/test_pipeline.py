"""A pipeline gives what a manifest's job gives, is loaded by diffusers' own code, and refuses what it cannot do."""

import json
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import add_hook_to_module
from diffusers import MochiPipeline, MochiTransformer3DModel
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaModel

from pusa.api.given import as_frames
from pusa.api.pipeline import Condition, PusaPipeline
from pusa.backbones import find_family
from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.errors import ConditionError, WeightsError
from pusa.generate.sampling import sample_job
from pusa.manifest.models import ModelSpec
from pusa.registry import find
from pusa.tasks import TASKS
from pusa.video.media import read_frames
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN
from pusa.weights.write import config_of, write_transformer
from tests.helpers.media import video
from tests.helpers.small_hunyuan_model import write_hunyuan
from tests.helpers.small_wan import write_wan_2_1, write_wan_2_2_5b, write_wan_2_2_a14b

SIZE = {"width": 32, "height": 32}
LENGTH = {"mochi": 19, "wan2.1": 13, "wan2.2-a14b": 13, "wan2.2-5b": 13, "hunyuan_video": 13}  # four latent frames
PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return backbone -> the folder of a small model in diffusers' layout."""
    root = tmp_path_factory.mktemp("models")
    return {
        "mochi": BUILTIN / "tiny",
        "wan2.1": write_wan_2_1(root / "wan"),
        "wan2.2-a14b": write_wan_2_2_a14b(root / "a14b"),
        "wan2.2-5b": write_wan_2_2_5b(root / "5b"),
        "hunyuan_video": write_hunyuan(root / "hunyuan"),
    }


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Draw no progress bars."""
    monkeypatch.setattr(PusaPipeline, "_progress_bar_config", {"disable": True}, raising=False)


def ours(spec, task="text_to_video", **keys):
    """Return the latents of a manifest's job."""
    keys = {"prompt": PROMPT, "negative_prompt": "blue", "steps": 3, "guidance": 2.5, "seed": 5, **SIZE, **keys}
    return sample_job(
        find(TASKS, task, "task")(id="a", task=task, **keys), Model(ModelSpec.model_validate(spec), "cpu")
    )


def call(pipe, *conditions, **keys):
    common = {"negative_prompt": "blue", "num_inference_steps": 3, "generator": 5, **SIZE}
    if not keys.keys() & {"guidance_scale", "true_cfg_scale"}:
        common["true_cfg_scale" if pipe.family.job.embedded_guidance else "guidance_scale"] = 2.5
    return pipe(PROMPT, conditions=conditions, **{**common, **keys}).frames


def settings(backbone):
    """Return the settings of a job that its family decides; a job without a manifest has the first family's."""
    return {"num_frames": LENGTH[backbone], "noise_schedule": find_family(backbone).job.noise_schedule}


@pytest.mark.parametrize("backbone", LENGTH)
def test_text_to_video_is_that_of_a_manifest(folders, backbone):
    pipe = PusaPipeline.from_pretrained(folders[backbone])
    assert pipe.family.name == backbone
    latents = ours({"backbone": backbone, "weights": str(folders[backbone])}, **settings(backbone))
    made = call(pipe, num_frames=LENGTH[backbone], output_type="latent")
    assert made.shape == (1, *latents.shape) and torch.allclose(made[0], latents, atol=1e-4)


def test_guidance_of_a_distilled_model_has_the_names_that_diffusers_gives_it(folders):
    spec = {"backbone": "hunyuan_video", "weights": str(folders["hunyuan_video"])}
    pipe, own = PusaPipeline.from_pretrained(folders["hunyuan_video"]), settings("hunyuan_video")
    given = [
        ({}, {"guidance": 1, "embedded_guidance": 6}),
        ({"guidance_scale": 6.0, "true_cfg_scale": 1.0}, {"guidance": 1, "embedded_guidance": 6}),
        ({"guidance_scale": 3}, {"guidance": 1, "embedded_guidance": 3}),
        ({"guidance_scale": 3, "true_cfg_scale": 2.5}, {"guidance": 2.5, "embedded_guidance": 3}),
    ]
    made = []
    for names, keys in given:
        common = {"negative_prompt": "blue", "num_inference_steps": 3, "generator": 5, "num_frames": 13, **SIZE}
        made.append(pipe(PROMPT, output_type="latent", **common, **names).frames[0])
        assert torch.allclose(made[-1], ours(spec, **own, **keys), atol=1e-4)
        assert pipe.guidance_scale == keys["embedded_guidance"]
    assert torch.equal(made[0], made[1])
    assert min((one - other).abs().max() for one, other in pairwise(made[1:])) > 1e-3
    for names, problem in (({"guidance_scale": 0.5}, "guidance_scale"), ({"true_cfg_scale": 0.5}, "true_cfg_scale")):
        with pytest.raises(ConditionError, match=f"^{problem}: "):
            pipe(PROMPT, **names)


def test_a_model_that_was_not_distilled_refuses_the_names_of_one_that_was(tiny):
    with pytest.raises(ConditionError, match="true_cfg_scale was given; mochi was not distilled with guidance"):
        tiny(PROMPT, true_cfg_scale=3.0)


def pictures(folder):
    rng = np.random.default_rng(3)
    made = [Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)) for _ in range(2)]
    for number, picture in enumerate(made):
        picture.save(folder / f"{number}.png")
    return made


@pytest.mark.parametrize("backbone", ["mochi", "wan2.2-a14b"])
def test_given_pictures_are_those_of_a_manifest(folders, backbone, tmp_path):
    first, second = pictures(tmp_path)
    pipe, common = PusaPipeline.from_pretrained(folders[backbone]), settings(backbone)
    spec = {"backbone": backbone, "weights": str(folders[backbone])}
    length = {"num_frames": common["num_frames"], "output_type": "latent"}

    latents = ours(spec, "image_to_video", image=tmp_path / "0.png", multiplier=0.3, **common)
    made = call(pipe, Condition(first, multiplier=0.3), **length)
    assert torch.allclose(made[0], latents, atol=1e-4)

    keyframes = {0: {"image": tmp_path / "0.png"}, -1: {"image": tmp_path / "1.png", "multiplier": 0.5}}
    latents = ours(spec, "keyframes", frames=keyframes, **common)
    made = call(pipe, Condition(first), Condition(second, position=-1, multiplier=0.5), **length)
    assert torch.allclose(made[0], latents, atol=1e-4)


def test_pictures_and_clips_of_every_kind_are_the_same_frames():
    clip = np.random.default_rng(3).integers(0, 256, (5, 40, 56, 3), np.uint8)
    pictures = [Image.fromarray(frame) for frame in clip]
    tensor = torch.from_numpy(clip).movedim(-1, 1)
    kinds = [clip, list(clip), clip[None], clip / 255, pictures, [pictures], tuple(pictures), tensor, tensor[None]]
    for kind in [*kinds, list(tensor), tensor / 255, [tensor / 255]]:
        assert np.array_equal(as_frames(kind), clip)
    for kind in (pictures[0], [pictures[0]], clip[0], tensor[0], tensor[0] / 255):
        assert np.array_equal(as_frames(kind), clip[:1])


def test_two_clips_are_those_of_a_transition_and_latents_may_be_given(tiny, tmp_path):
    clips = [video(tmp_path / f"{seed}.mp4", 19, size=(32, 32), seed=seed) for seed in (1, 2)]
    start, end = (np.stack(list(read_frames(clip, range(19)))) for clip in clips)
    common = settings("mochi")
    latents = ours(
        {"weights": "builtin:tiny"},
        "transition",
        start=clips[0],
        end=clips[1],
        end_frames=[-1],
        multipliers=[0.2, 0.7],
        **common,
    )
    given = Condition(start[:1], multiplier=0.2), Condition(end, position=-1, multiplier=0.7, take=[-1])
    made = call(tiny, *given, num_frames=19, output_type="latent")
    assert torch.allclose(made[0], latents, atol=1e-4)
    kept = call(tiny, Condition(made[0], position=[0, 1, 2, 3]), num_frames=19, output_type="latent")
    assert torch.equal(kept, made)  # all latent frames are given, and multiplier 0 keeps them


def test_every_kind_of_output_has_the_frames_of_the_latents(tiny):
    latents = call(tiny, num_frames=7, output_type="latent")
    frames = Model(ModelSpec(weights="builtin:tiny"), "cpu").decode(latents[0]).astype(np.float32) / 255
    numpy, torches, pil = (call(tiny, num_frames=7, output_type=kind) for kind in ("np", "pt", "pil"))
    assert numpy.shape == (1, 7, 32, 32, 3) and np.array_equal(numpy[0], frames)
    assert torches.shape == (1, 7, 3, 32, 32) and np.array_equal(torches.movedim(2, -1).numpy(), numpy)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pil[0]]) / np.float32(255), frames)


def test_prompts_have_their_own_videos_and_negative_prompts(tiny):
    common = {**SIZE, "num_frames": 7, "num_inference_steps": 2, "guidance_scale": 3, "output_type": "latent"}
    common["num_videos_per_prompt"] = None  # is one
    texts = {"red": "blue", "a square": ""}
    made = tiny(list(texts), negative_prompt=list(texts.values()), generator=[5, np.int64(6)], **common).frames
    for number, (prompt, negative) in enumerate(texts.items()):
        alone = tiny(prompt, negative_prompt=negative, generator=5 + number, **common).frames
        assert torch.allclose(made[number], alone[0], atol=1e-4)
    other = tiny("red", negative_prompt="", generator=5, **common).frames
    assert not torch.allclose(other[0], made[0], atol=1e-3)


def test_seeds_and_generators(tiny):
    latents = {"num_frames": 7, "output_type": "latent"}
    seeded = call(tiny, **latents)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(call(tiny, generator=generator, **latents), seeded)
    assert not torch.equal(call(tiny, generator=generator, **latents), seeded)  # it was drawn from
    two = call(tiny, generator=4, num_videos_per_prompt=2, **latents)
    assert torch.allclose(two[1:], seeded, atol=1e-4) and not torch.allclose(two[:1], seeded, atol=1e-2)
    made = []
    for _ in range(2):
        torch.manual_seed(9)
        made.append(call(tiny, generator=None, **latents))
    assert torch.equal(*made)


def test_diffusers_own_pipelines_and_ours_share_their_modules(folders, tiny):
    theirs = MochiPipeline.from_pretrained(folders["mochi"], dtype=torch.float32)
    pipe = PusaPipeline.from_pipe(theirs)
    assert isinstance(pipe.transformer, PusaMochiTransformer3DModel)
    assert type(theirs.transformer) is MochiTransformer3DModel  # still usable
    for part in ("transformer", "vae"):
        pairs = zip(getattr(pipe, part).parameters(), getattr(theirs, part).parameters(), strict=True)
        assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    made = call(pipe, num_frames=7, output_type="latent")
    assert torch.equal(made, call(tiny, num_frames=7, output_type="latent"))
    again = PusaPipeline(**pipe.components)
    again.transformer = theirs.transformer  # becomes ours when it is used
    assert torch.equal(call(again, num_frames=7, output_type="latent"), made)


@pytest.mark.parametrize("backbone", ["mochi", "wan2.2-a14b", "hunyuan_video"])
def test_a_saved_pipeline_is_loaded_again_by_ours_by_diffusers_and_by_a_manifest(folders, backbone, tmp_path):
    boundary = 0.5 if backbone == "wan2.2-a14b" else None
    pipe = PusaPipeline.from_pretrained(folders[backbone], boundary_ratio=boundary)
    length = {"num_frames": LENGTH[backbone], "output_type": "latent"}
    made = call(pipe, **length)
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "PusaPipeline" and index["boundary_ratio"] == boundary
    assert torch.allclose(call(PusaPipeline.from_pretrained(tmp_path / "saved"), **length), made, atol=1e-4)
    latents = ours({"backbone": backbone, "weights": str(tmp_path / "saved")}, **settings(backbone))
    assert torch.allclose(made[0], latents, atol=1e-4)
    theirs = getattr(diffusers, pipe.family.pipeline).from_pretrained(tmp_path / "saved")
    assert type(theirs.transformer).__module__.startswith("diffusers.")


@torch.no_grad()
def test_a_saved_llama_has_all_its_layers_for_other_readers(folders, tmp_path):
    """The last two are not kept, and no reader uses them. But diffusers counts from the last one."""
    pipe = PusaPipeline.from_pretrained(folders["hunyuan_video"])
    pipe.save_pretrained(tmp_path / "saved")
    places = (folders["hunyuan_video"], tmp_path / "saved")
    readers = [LlamaModel.from_pretrained(place / "text_encoder") for place in places]
    ids = torch.arange(3, 23)[None]
    states = [model(ids, output_hidden_states=True).hidden_states for model in (*readers, pipe.text_encoder)]
    assert [len(each) for each in states] == [5] * 3 and torch.equal(states[0][-3], states[1][-3])
    assert torch.equal(states[0][-3], states[2][-3])


def test_a_fine_tuned_transformer_is_given_beside_a_base():
    tuned = MochiTransformer3DModel.from_pretrained(BUILTIN / "tiny-pusa/transformer", torch_dtype=torch.float32)
    pipe = PusaPipeline.from_pretrained("builtin:tiny", transformer=tuned)
    latents = ours({"weights": "builtin:tiny-pusa"}, **settings("mochi"))
    assert torch.allclose(call(pipe, num_frames=19, output_type="latent")[0], latents, atol=1e-4)


def test_a_recorded_latent_space_is_found(tmp_path, caplog):
    tuned = MochiTransformer3DModel.from_pretrained(BUILTIN / "tiny/transformer")
    write_transformer(tmp_path / "transformer", tuned.state_dict(), config_of(tuned), {"latent_space": "vae"})
    for place, options in ((tmp_path / "transformer", {}), (tmp_path, {"subfolder": "transformer"})):
        transformer = MochiTransformer3DModel.from_pretrained(place, **options)
        assert PusaPipeline.from_pretrained("builtin:tiny", transformer=transformer).config.latent_space == "vae"
    with pytest.raises(WeightsError, match="has latent_space 'vae'; the manifest has 'dit'"):
        PusaPipeline.from_pretrained("builtin:tiny", transformer=transformer, latent_space="dit")
    assert PusaPipeline.from_pretrained("builtin:tiny", latent_space="vae").config.latent_space == "vae"
    assert not caplog.records
    transformer.register_to_config(_name_or_path="org/on-a-hub")
    assert PusaPipeline.from_pretrained("builtin:tiny", transformer=transformer).config.latent_space == "dit"
    assert "from org/on-a-hub, whose files were not looked at: its latent space is taken as dit" in caplog.text
    with pytest.raises(WeightsError, match="latent_space"):
        PusaPipeline.from_pretrained("builtin:tiny", latent_space="pixels")


def random_lora(pipe, part="transformer", seed=0):
    """Return tensors of a LoRA with a rank and an alpha for each layer, with the names that PEFT's users know."""
    torch.manual_seed(seed)
    shapes = {name: weight.shape for name, weight in getattr(pipe, part).named_parameters()}
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(("attn1.to_q.weight", "to_k.weight"))]
    tensors = {}
    for number, layer in enumerate(layers):
        rank, (out, into) = 2 + number % 3, shapes[f"{layer}.weight"]
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, into)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, rank) * 0.3
        tensors[f"transformer.{layer}.alpha"] = torch.tensor(1.0 + number % 2)
    return tensors


def test_a_lora_gives_what_it_gives_in_a_manifest(folders, tmp_path):
    pipe, length = PusaPipeline.from_pretrained(folders["wan2.1"]), {"num_frames": 13, "output_type": "latent"}
    plain, tensors = call(pipe, **length), random_lora(pipe)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path)
    spec = {"backbone": "wan2.1", "weights": str(folders["wan2.1"])}
    spec["loras"] = [{"weights": str(path), "strength": 0.7}]
    latents = ours(spec, **settings("wan2.1"))
    assert not torch.allclose(latents, plain[0], atol=1e-3)
    for weights, name in ((tensors, None), (str(tmp_path), None), (tmp_path, path.name), (path, None)):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(weights, adapter_name="one", strength=0.7, weight_name=name)
        assert torch.allclose(call(pipe, **length)[0], latents, atol=1e-4)
    pipe.set_adapters("one", 0.0)
    assert torch.allclose(call(pipe, **length), plain, atol=1e-4)
    pipe.set_adapters("one", 1.0)
    with pytest.raises(WeightsError, match="fuse_lora"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.fuse_lora()
    assert torch.allclose(call(pipe, **length)[0], latents, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(call(pipe, **length), plain, atol=1e-4)


def test_two_loras_are_summed(folders, tmp_path):
    pipe, length = PusaPipeline.from_pretrained(folders["wan2.1"]), {"num_frames": 13, "output_type": "latent"}
    loras = []
    for seed, name in enumerate("ab"):
        save_file(random_lora(pipe, seed=seed), tmp_path / f"{name}.safetensors")
        loras.append({"weights": str(tmp_path / f"{name}.safetensors"), "strength": 0.5})
    latents = ours({"backbone": "wan2.1", "weights": str(folders["wan2.1"]), "loras": loras}, **settings("wan2.1"))
    for name in "ab":
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors", name, 0.5)
    pipe.set_adapters(["a", "b"])
    assert pipe.get_active_adapters() == ["a", "b"]
    assert torch.allclose(call(pipe, **length)[0], latents, atol=1e-4)


def test_a_lora_of_an_expert_goes_to_its_transformer(folders):
    pipe, length = PusaPipeline.from_pretrained(folders["wan2.2-a14b"]), {"num_frames": 13, "output_type": "latent"}
    tensors = random_lora(pipe)
    with pytest.raises(WeightsError, match=r"expert is None; wan2.2-a14b has high and low"):
        pipe.load_lora_weights(tensors)
    pipe.load_lora_weights(tensors, "low", load_into_transformer_2=True)
    pipe.load_lora_weights(tensors, "high", expert="high")
    assert pipe.get_list_adapters() == {"transformer": ["high"], "transformer_2": ["low"]}
    with pytest.raises(WeightsError, match=r"does not fit: the transformer has no '[^']*'(, '[^']*'){2} and \d+ more$"):
        pipe.load_lora_weights({name.replace("blocks", "none"): t for name, t in tensors.items()}, expert="low")
    assert len(call(pipe, **length)) == 1


def test_a_built_in_lora_is_loaded_by_name_and_one_of_another_family_refused(tmp_path):
    pipe = PusaPipeline.from_pretrained("builtin:tiny-wan")
    tensors = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 3)}
    tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"] = torch.ones(3, 2)
    save_file(tensors, tmp_path / "lora.safetensors", {"pusa": json.dumps({"backbone": "mochi"})})
    with pytest.raises(WeightsError, match=r"lora\.safetensors was made for mochi; this pipeline is wan2\.1$"):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.load_lora_weights("builtin:tiny-wan-pusa")
    spec = {"backbone": "wan2.1", "weights": "builtin:tiny-wan", "lora": "builtin:tiny-wan-pusa"}
    latents = ours(spec, **settings("wan2.1"))
    assert torch.allclose(call(pipe, num_frames=13, output_type="latent")[0], latents, atol=1e-4)


def test_a_callback_sees_and_changes_the_latents_and_may_interrupt(tiny):
    pipe, length, seen = tiny, {"num_frames": 7, "output_type": "latent"}, []

    def look(pipe, step, timestep, tensors):
        assert (pipe.num_timesteps, pipe.guidance_scale) == (3, 2.5)
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return tensors

    plain = call(pipe, callback_on_step_end=look, **length)
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] == 1000
    assert torch.equal(seen[-1][2], plain)

    def replace(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    assert not call(pipe, callback_on_step_end=replace, **length).any()

    with pytest.raises(ConditionError, match=r"the callback's latents are \(1,\); expected \(1, 12, 2, 4, 4\)"):
        call(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}, **length)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    assert torch.equal(call(pipe, callback_on_step_end=stop, **length), seen[1][2])
    assert torch.equal(call(pipe, **length), plain)  # the next call is whole


class Recorder:
    """Notes when a module is moved to the device, as the hook of `enable_model_cpu_offload` moves it."""

    no_grad = False

    def __init__(self, name, log):
        self.name, self.log, self.execution_device = name, log, torch.device("cpu")

    def init_hook(self, module):
        return module

    def pre_forward(self, module, *args, **kwargs):
        if self.log[-1:] != [self.name]:
            self.log.append(self.name)
        return args, kwargs

    def post_forward(self, module, output):
        return output

    def detach_hook(self, module):
        return module


def test_each_module_is_moved_to_the_device_before_it_is_used(folders):
    pipe, log = PusaPipeline.from_pretrained(folders["wan2.2-a14b"]), []
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            add_hook_to_module(module, Recorder(name, log))
    call(pipe, Condition(np.zeros((32, 32, 3), np.uint8)), num_frames=13)
    assert log == ["text_encoder", "vae", "transformer", "transformer_2", "vae"]
    assert pipe.model_cpu_offload_seq == "text_encoder->text_encoder_2->transformer->transformer_2->vae"


def test_model_offload_works_and_other_kinds_are_refused():
    pipe = PusaPipeline.from_pretrained("builtin:tiny")
    made = call(pipe, num_frames=7, output_type="latent")
    pipe.enable_model_cpu_offload(device="cpu")  # accelerate's own hooks, which move modules to where they are
    for _ in range(2):  # the hooks are put back after each call
        assert all(hasattr(getattr(pipe, part), "_hf_hook") for part in ("text_encoder", "transformer", "vae"))
        assert torch.equal(call(pipe, num_frames=7, output_type="latent"), made)
    for refuse in (pipe.enable_sequential_cpu_offload, pipe.enable_group_offload):
        with pytest.raises(NotImplementedError, match="use enable_model_cpu_offload"):
            refuse()


def test_modules_that_do_not_fit_are_one_clear_error(folders, tiny):
    wan = PusaPipeline.from_pretrained(folders["wan2.1"])
    with pytest.raises(WeightsError, match="the vae is a PusaAutoencoderKLWan; a mochi has a PusaAutoencoderKLMochi"):
        PusaPipeline(**{**tiny.components, "vae": wan.vae})
    with pytest.raises(WeightsError, match=r"no family has these transformers: transformer a UMT5EncoderModel"):
        PusaPipeline(**{**tiny.components, "transformer": wan.text_encoder})
    with pytest.raises(WeightsError, match=r"no family has these transformers: .*transformer_2"):
        PusaPipeline(**{**tiny.components, "transformer_2": wan.transformer})
    with pytest.raises(WeightsError, match=r"boundary_ratio is 0\.5"):
        PusaPipeline(**tiny.components, boundary_ratio=0.5)
    with pytest.raises(
        WeightsError, match=r"builtin:tiny-pusa is a fine-tune; load builtin:tiny, and this as transformer or LoRA"
    ):
        PusaPipeline.from_pretrained("builtin:tiny-pusa")
    with pytest.raises(WeightsError, match="unknown built-in model"):
        PusaPipeline.from_pretrained("builtin:none")
    pipe = PusaPipeline(**{**tiny.components, "vae": None})
    with pytest.raises(WeightsError, match="the pipeline has no vae"):
        call(pipe, num_frames=7)
