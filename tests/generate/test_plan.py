"""The memory that jobs need, from a dry run: against a real run, and at the published size."""

import re
import subprocess
import sys
from collections import deque

import pytest
import torch

from pusa.backbones.base import find_backbone
from pusa.backbones.dry_run import GIB, FusedAttention, PeakMemory, empty
from pusa.generate.check import check_jobs
from pusa.generate.plan import plan
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.weights.convert import convert
from pusa.weights.load import build
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN, locate_config
from tests.helpers.small_hunyuan_model import write_hunyuan
from tests.helpers.stub_model import TINY

SIZE = {"width": 64, "height": 64, "num_frames": 31, "steps": 2}


def manifest(weights="builtin:tiny", **job) -> GenerateManifest:
    jobs = [{"id": "a", "task": "text_to_video", "prompt": "", **SIZE, **job}]
    return GenerateManifest.model_validate({"model": ModelSpec(weights=weights), "jobs": jobs})


def memory_of_parts(*args, **job):
    return {part.part: part for part in plan(manifest(*args, **job), torch.float32).parts}


def test_weights_are_counted_from_shapes_alone(tmp_path):
    parts = memory_of_parts()
    assert {name: part.parameters for name, part in parts.items()} == {
        "text_encoder": 84_032, "transformer": 1_700_376, "vae": 1_377_251,
    }  # fmt: skip
    assert all(part.weights == 4 * part.parameters for part in parts.values())
    convert(BUILTIN / "tiny", tmp_path, "genmo")
    spec = ModelSpec(weights=str(tmp_path), text_encoder="builtin:tiny")
    single = plan(manifest().model_copy(update={"model": spec}), torch.float32)
    assert single.parts == plan(manifest(), torch.float32).parts


def test_all_text_encoders_are_counted_and_are_on_the_device_together(tmp_path):
    spec = {"backbone": "hunyuan_video", "weights": str(write_hunyuan(tmp_path))}
    job = {"id": "a", "task": "text_to_video", "width": 16, "height": 16, "num_frames": 1}
    made = plan(GenerateManifest.model_validate({"model": spec, "jobs": [job]}), torch.float32)
    parts = {part.part: part for part in made.parts}
    model = Model(ModelSpec(**spec, offload=True), "meta")
    for name in ("text_encoder", "text_encoder_2"):
        module = model.text_parts[name]
        assert parts[name].weights == sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert {module.device.type for module in model._loaded.values()} == {"meta"}
    assert parts.keys() == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    texts = [parts[name].weights for name in ("text_encoder", "text_encoder_2")]
    assert min(texts) > 0 and made.one_at_a_time == max(sum(texts), *(p.weights + p.working for p in made.parts))


def test_the_dry_run_counts_what_a_real_run_uses():
    model = Model(ModelSpec(weights="builtin:tiny"))
    z, text = torch.randn(2, 12, 6, 8, 8), model.backbone.longest_text(model.transformer, 2)
    with torch.no_grad(), PeakMemory() as memory:
        model.backbone.predict(model.transformer, z, torch.ones(2, 6), text)
    assert memory_of_parts()["transformer"].working == pytest.approx(memory.peak, rel=0.05)
    with torch.no_grad(), PeakMemory() as decoding:
        deque(model.backbone.decode_video(model.vae, z[:1]), maxlen=0)
    with torch.no_grad(), PeakMemory() as encoding:
        model.backbone.encode_video(model.vae, torch.rand(1, 3, 31, 64, 64))
    assert memory_of_parts()["vae"].working == pytest.approx(max(decoding.peak, encoding.peak), rel=0.15)


def test_larger_and_guided_jobs_need_more_and_offload_needs_less():
    small, large, unguided = memory_of_parts(), memory_of_parts(width=128), memory_of_parts(guidance=1)
    for part in ("transformer", "vae"):
        assert large[part].working > 1.25 * small[part].working
    assert unguided["transformer"].working < 0.6 * small["transformer"].working
    estimate = plan(manifest(), torch.float32)
    assert estimate.one_at_a_time < estimate.all_on_device
    table = estimate.table(memory=estimate.one_at_a_time + 1, offload=True)
    assert "all parts on the device: 0.0" in table and "does NOT fit" in table.splitlines()[-2]
    assert "fits into" in table.splitlines()[-1] and table.endswith("<- this manifest")


def test_mochi_at_its_real_size_takes_seconds_and_no_memory(tmp_path):
    """In a process of its own, whose memory must stay below 2 GiB, with only the published configuration on disk."""
    code = f"""
import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from transformers import T5Config
from pathlib import Path
folder = Path({str(tmp_path)!r})
with torch.device("meta"):
    MochiTransformer3DModel().save_config(folder / "transformer")
    AutoencoderKLMochi().save_config(folder / "vae")
xxl = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
T5Config(**xxl, feed_forward_proj="gated-gelu").save_pretrained(folder / "text_encoder")
from pusa.generate.check import check_jobs
from pusa.generate.plan import plan
from pusa.manifest.models import GenerateManifest
job = dict(id="a", task="text_to_video", prompt="", width=848, height=480, num_frames=163)
estimate = plan(GenerateManifest.model_validate(dict(model=dict(weights=str(folder)), jobs=[job])), torch.bfloat16)
for part in estimate.parts:
    print(part.part, part.parameters, part.weights, part.working)
# Not getrusage: its maximum includes that of the process which started this one.
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
assert int(peak) < 2 * 2**20, peak
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = {row[0]: [int(value) for value in row[1:]] for row in map(str.split, out.stdout.splitlines())}
    assert rows["transformer"][0] == 10_027_677_744 and rows["transformer"][1] == 2 * rows["transformer"][0]
    assert 4.7e9 < rows["text_encoder"][0] < 4.8e9
    assert rows["vae"][0] == 459_748_611
    # A token's feed-forward alone is 2 x 8192 wide: 44,520 of them, twice for guidance, in bf16.
    assert 2 * 44_520 * 2 * 8192 * 2 < rows["transformer"][2] < 16 * GIB


def test_a_long_video_needs_no_more_of_the_transformer_than_its_window(drawn):
    window = {"task": "long_video", "num_frames": 193, "window": 31}
    assert memory_of_parts(**window)["transformer"].working == memory_of_parts()["transformer"].working
    ring = memory_of_parts(task="loop")
    assert ring["transformer"].working == memory_of_parts()["transformer"].working
    assert ring["vae"].working > memory_of_parts()["vae"].working  # a loop is decoded twice in a row


def test_a_video_of_any_length_is_planned_from_its_first_chunks():
    """Decoding needs no more after three chunks, and encoding grows evenly: as much as the whole, in less time."""
    backbone = find_backbone("mochi")
    vae = build(backbone, locate_config(ModelSpec(weights="builtin:tiny"), "vae")).eval().requires_grad_(False)
    frames = 61  # latent frames: six chunks
    long = {
        "task": "completion",
        "video": "clip.mp4",
        "given": [0, -1],
        "num_frames": backbone.geometry.num_frames(frames),
    }
    x_BCTHW, z_BCFhw = empty(1, 3, long["num_frames"], 64, 64), empty(1, 12, frames, 8, 8)
    with torch.no_grad(), FusedAttention(), PeakMemory() as encoding:
        backbone.encode_video(vae, x_BCTHW)
    with torch.no_grad(), FusedAttention(), PeakMemory() as decoding:
        deque(backbone.decode_video(vae, z_BCFhw), maxlen=0)
    assert memory_of_parts(**long)["vae"].working == pytest.approx(encoding.peak, rel=0.01)
    film = {"task": "long_video", "window": 31, "steps": 1, "num_frames": 99_997}
    assert memory_of_parts(**film)["vae"].working == decoding.peak
    assert encoding.peak > 1.05 * decoding.peak


def test_of_many_jobs_those_that_need_most_are_planned():
    sizes = [{"width": 32, "num_frames": 61}, {"width": 96}, {"width": 64, "guidance": 1, "num_frames": 121}]
    jobs = [{"id": f"j{i}", "task": "text_to_video", "prompt": "", **SIZE, **size} for i, size in enumerate(sizes)]
    together = plan(manifest().model_copy(update={"jobs": GenerateManifest(model=TINY, jobs=jobs).jobs}), torch.float32)
    alone = [memory_of_parts(**size) for size in sizes]
    for part in together.parts:
        assert part.working == max(parts[part.part].working for parts in alone)


def test_only_the_given_frames_of_a_clip_are_encoded(drawn):
    clip = {"task": "completion", "video": drawn / "media/ball.mp4"}
    first, whole = (memory_of_parts(given=[frame], **clip)["vae"].working for frame in (0, 5))
    assert memory_of_parts()["vae"].working <= first <= whole


@pytest.mark.parametrize(
    "job, problem",
    [
        ({"width": 8192, "height": 8192, "num_frames": 99_997}, "pixels; at most 68,719,476,736"),
        ({"task": "long_video", "num_frames": 99_997, "window": 31, "steps": 10_000}, "levels; at most 268,435,456"),
    ],
)
def test_jobs_of_absurd_size_are_refused_before_anything_is_counted(job, problem):
    assert re.search(problem, check_jobs(manifest(**job))["a"])
