"""Check everything that needs a CUDA device, in less than 10 minutes, and print a table.

    python -m tests.gpu.check                        # all checks
    python -m tests.gpu.check --report gpu.md        # and write the table as Markdown
    python -m tests.gpu.check --only memory offload  # some of them
    python -m tests.gpu.check --device cpu           # at small sizes, to see that this script runs

The exit code is 0 if every check passed, 1 if one failed, and 2 where there is no CUDA device. Nothing is downloaded:
the models are the built-in tiny ones, and random weights at the width of the published model.
"""

import argparse
import gc
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from pusa.backbones.dry_run import GIB
from pusa.backbones.hunyuan_video.backbone import HunyuanVideo
from pusa.backbones.mochi.backbone import Mochi
from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.backbones.tiny_recipe import find_tiny_recipe
from pusa.errors import NoMemoryError
from pusa.finetune.loss import frame_errors
from pusa.finetune.metrics import read_losses
from pusa.finetune.parallel import World, clip_gradients, process_group, shard
from pusa.finetune.plan import plan as plan_training
from pusa.finetune.stage import finetune
from pusa.finetune.state import Training
from pusa.finetune.trainable import configure
from pusa.generate.decode import decode_job
from pusa.generate.latents import read_latents
from pusa.generate.outputs import LATENTS
from pusa.generate.plan import plan as plan_generation
from pusa.generate.sampling import sample_job
from pusa.generate.stage import generate
from pusa.ingest.stage import ingest
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import (
    Bucket,
    ClipSettings,
    FinetuneManifest,
    GenerateManifest,
    IngestManifest,
    ModelSpec,
    PrecomputeManifest,
)
from pusa.precompute.stage import precompute
from pusa.tiny.dataset import draw_dataset
from pusa.tiny.shapes import draw, random_scene
from pusa.video.compare import psnr
from pusa.weights.load import build
from pusa.weights.memory import VideoEncoder
from pusa.weights.model import Model
from pusa.weights.resolve import builtin_folder, locate_config
from tests.helpers.small_hunyuan import frame_levels, hunyuan_inputs, new_hunyuan_transformer, vectorized

ROOT = Path(__file__).parents[2]
TINY = ModelSpec(weights="builtin:tiny")
TINY_PUSA = ModelSpec(weights="builtin:tiny-pusa")
TINY_WIDTH = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "pooled_projection_dim": 12,
    "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 8,
}  # fmt: skip
# The widths of the published HunyuanVideo.
HUNYUAN_WIDTH = {
    "num_attention_heads": 24, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56), "mlp_ratio": 4.0,
    "text_embed_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    measured: str
    expected: str
    passed: bool
    seconds: float = 0


@dataclass(frozen=True)
class Bench:
    """Where the checks run: a device, and a folder for their files. On a CPU all sizes are small."""

    device: torch.device
    folder: Path

    @property
    def is_cuda(self) -> bool:
        """Return whether this is a CUDA device, so that sizes are real and memory is measured."""
        return self.device.type == "cuda"

    @property
    def one_block(self) -> dict[str, int]:
        """Return the configuration of a transformer of one block; on a GPU it is as wide as the published one."""
        narrow = {"num_attention_heads": 2, "pooled_projection_dim": 32, "text_embed_dim": 64}
        return {"num_layers": 1, **({} if self.is_cuda else narrow)}

    @property
    def shape(self) -> Bucket:
        """Return the clips that the wide block is tried with: 2,730 tokens on a GPU."""
        size = {"width": 416, "height": 240, "num_frames": 37} if self.is_cuda else {
            "width": 64, "height": 64, "num_frames": 13}  # fmt: skip
        return Bucket(**size)

    @cached_property
    def made(self) -> Path:
        """Make the tiny data set, its clips and its latents once, on the device, and return the run's folder."""
        folder = self.folder / "made"
        draw_dataset(folder / "drawn", 12 if self.is_cuda else 4)
        clips = ClipSettings(width=64, height=64, num_frames=31)
        ingest(IngestManifest(source=folder / "drawn/videos", clips=clips), folder)
        precompute(PrecomputeManifest(clips=folder / "clips", model=TINY), folder)
        return folder

    def peak(self, run: Callable[[], Any], reserved: bool = False) -> int:
        """Run something and return how many bytes more than before it had on the device at most; 0 on a CPU.

        Counted are the bytes of tensors, or those that the allocator reserved for them.
        """
        if not self.is_cuda:
            run()
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved() if reserved else torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()) - before

    def seconds(self, run: Callable[[], Any]) -> float:
        """Return the seconds of a second run; the first one warms up."""
        run()
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Wait until the device has done everything that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()


def limit(check: str, value: float, most: float, unit: str = "") -> Row:
    """Return a row that passes where a value is at most `most`."""
    return Row(check, f"{value:.2e}{unit}", f"<= {most:.0e}{unit}", value <= most)


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its prefix."""
    return str(dtype).removeprefix("torch.")


# The transformer


def pair(bench: Bench, wide: bool) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return diffusers' transformer and ours with the same fp32 weights, and inputs. Wide: one block as published."""
    config = bench.one_block if wide else TINY_WIDTH
    frames, height, width = (7, 30, 52) if wide and bench.is_cuda else (4, 4, 6)
    torch.manual_seed(0)
    with torch.device(bench.device):
        base, ours = MochiTransformer3DModel(**config).eval(), PusaMochiTransformer3DModel(**config).eval()
        for weight in base.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02 if wide else 0.2)
        ours.load_state_dict(base.state_dict())
        tokens = base.config.max_sequence_length
        given = {
            "hidden_states": torch.randn(2, 12, frames, height, width),
            "encoder_hidden_states": torch.randn(2, tokens, base.config.text_embed_dim),
            "encoder_attention_mask": torch.arange(tokens)[None] < torch.tensor([tokens // 2, tokens])[:, None],
        }
    return base, ours, given


@torch.no_grad()
def velocity(model: nn.Module, timestep: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Run a transformer in the dtype of its weights and return its output in fp32."""
    dtype = next(model.parameters()).dtype
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    return model(timestep=timestep.to(given["hidden_states"].device), return_dict=False, **cast)[0].float()


def check_parity(bench: Bench) -> Iterator[Row]:
    """Compare equal levels with diffusers' transformer, which has one level for a clip."""
    t_B = torch.tensor([100.0, 700.0])
    for name, wide in (("tiny", False), ("one block as wide as published", True)):
        yield from parity_rows(name, *pair(bench, wide), t_B)


def parity_rows(name: str, base: nn.Module, ours: nn.Module, given: dict[str, Tensor], t_B: Tensor) -> Iterator[Row]:
    """Compare our transformer at equal levels with the base, of the same fp32 weights, in both dtypes."""
    t_BF = t_B[:, None].repeat(1, given["hidden_states"].shape[2])
    exact = velocity(base, t_B, given)
    scale = exact.abs().mean().item()
    for dtype in DTYPES:
        theirs = velocity(nn.Module.to(base, dtype), t_B, given)
        mine = velocity(nn.Module.to(ours, dtype), t_BF, given)
        check = f"equal levels are the base model, {name}, {short(dtype)}"
        if dtype is torch.float32:
            yield limit(check, (mine - theirs).abs().max().item() / scale, 1e-3, " of the mean")
        else:  # both are rounded, so each is compared with fp32
            ratio = ((mine - exact).abs().mean() / (theirs - exact).abs().mean()).item()
            yield Row(check, f"{ratio:.2f} of the base's error", "<= 1.2", ratio <= 1.2)


def check_levels(bench: Bench) -> Iterator[Row]:
    """Check that every latent frame has its own level, whatever shares its batch, and as on the CPU."""
    _, ours, given = pair(bench, wide=False)
    t_BF = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)) * 1000
    together = velocity(ours, t_BF, given)
    alone = torch.cat([velocity(ours, t_BF[[i]], {n: v[[i]] for n, v in given.items()}) for i in (0, 1)])
    yield limit("a batch of clips with other levels gives what each gives alone", gap(together, alone), 1e-3)
    changed = t_BF.clone()
    changed[:, 2] += 400
    effect_F = (velocity(ours, changed, given) - together).abs().mean((0, 1, 3, 4))
    others = effect_F[[0, 1, 3]].max().item()
    ratio = effect_F[2].item() / others
    yield Row("another level of one frame changes that frame most", f"{ratio:.1f} times", ">= 1.5 times", ratio >= 1.5)
    on_cpu = velocity(ours.cpu(), t_BF, {name: value.cpu() for name, value in given.items()})
    yield limit("levels of their own give the same as on the CPU, fp32", gap(together.cpu(), on_cpu), 1e-3)


def gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the mean magnitude of `b`."""
    return ((a - b).abs().max() / b.abs().mean()).item()


def check_attention(bench: Bench) -> Iterator[Row]:
    """Compare the fused attention kernels with plain arithmetic, in bf16, which all of them support."""
    _, ours, given = pair(bench, wide=True)
    ours = nn.Module.to(ours, torch.bfloat16)
    t_BF = torch.linspace(0, 1000, given["hidden_states"].shape[2])[None].repeat(2, 1)
    results, times = {}, {}
    try:
        for backend in ("_native_math", "_native_flash", "native"):
            ours.set_attention_backend(backend)
            results[backend] = velocity(ours, t_BF, given)
            times[backend] = bench.seconds(lambda: velocity(ours, t_BF, given))
    finally:
        ours.set_attention_backend("native")  # diffusers keeps the last one for the whole process
    for backend in ("_native_flash", "native"):
        error = (
            (results[backend] - results["_native_math"]).abs().mean() / results["_native_math"].abs().mean()
        ).item()
        speed = times["_native_math"] / times[backend]
        yield Row(
            f"attention backend {backend} is that of plain arithmetic, bf16",
            f"{error:.1e} of the mean, {speed:.1f} times as fast", "<= 2e-02", error <= 2e-2,
        )  # fmt: skip


@torch.no_grad()
def check_hunyuan_video(bench: Bench) -> Iterator[Row]:
    """Compare two blocks of HunyuanVideo, as wide as published, with the base, and these and its VAE with the CPU."""
    base = new_hunyuan_transformer(
        num_layers=1, num_single_layers=1, guidance_embeds=True, **(HUNYUAN_WIDTH if bench.is_cuda else {})
    )
    on_cpu = hunyuan_inputs((5, 8)) | {
        "encoder_hidden_states": torch.randn(2, 8, base.config.text_embed_dim),
        "pooled_projections": torch.randn(2, base.config.pooled_projection_dim),
    }
    ours, t_BF = vectorized(base), frame_levels(batch=2)
    expected = velocity(ours, t_BF, on_cpu)
    given = {name: value.to(bench.device) for name, value in on_cpu.items()}
    made = velocity(ours.to(bench.device), t_BF, given)
    yield limit("HunyuanVideo's levels of their own give the same as on the CPU, fp32", gap(made.cpu(), expected), 1e-3)
    t_B = torch.tensor([100.0, 700.0])
    yield from parity_rows("HunyuanVideo, as wide as published", base.to(bench.device), ours, given, t_B)

    hunyuan, vae = HunyuanVideo(), find_tiny_recipe("hunyuan_video").new_vae(torch.empty(0)).eval()
    frames = torch.from_numpy(draw(random_scene(0), num_frames=9)).movedim(-1, 0)[None]
    latents, videos = [], []
    for device in ("cpu", bench.device):
        latents.append(hunyuan.encode_video(vae.to(device), frames.to(device))[0].cpu())
        videos.append(torch.cat([part.cpu() for part in hunyuan.decode_video(vae, latents[0].to(device))], 2))
    for part, (theirs, mine) in (("encode", latents), ("decode", videos)):
        yield limit(f"HunyuanVideo's VAE: {part} as on the CPU, fp32", gap(mine, theirs), 1e-2)


# The VAE


def check_vae(bench: Bench) -> Iterator[Row]:
    """Compare encoding and decoding in chunks with the whole clip at once, on the tiny VAE."""
    model = Model(TINY, bench.device)
    frames = np.stack([draw(random_scene(seed)) for seed in range(2)])
    x_BCTHW = torch.from_numpy(frames).movedim(-1, 1).to(bench.device).float() / 127.5 - 1
    for dtype in DTYPES:
        vae = nn.Module.to(model.vae, dtype)

        @torch.no_grad()
        def run(at_once: int | None, vae: Any = vae, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            vae.latent_frames_at_once = at_once
            z_BCFhw = vae.encode(x_BCTHW.to(dtype)).latent_dist.mean
            return z_BCFhw.float(), vae.decode(z_BCFhw).sample.float()

        whole = run(None)
        for at_once in (1, 2):
            for part, mine, expected in zip(("encode", "decode"), run(at_once), whole, strict=True):
                most = 1e-2 if dtype is torch.float32 else 0.5
                yield limit(f"{part} {at_once} latent frames at a time, {short(dtype)}", gap(mine, expected), most)


def check_throughput(bench: Bench) -> Iterator[Row]:
    """Encode and decode with the published VAE's architecture and random weights, at the published frame size."""
    mochi, dtype = Mochi(), torch.bfloat16 if bench.is_cuda else torch.float32
    small = {"encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32, 32, 32, 32),
             "layers_per_block": (1, 1, 1, 1, 1)}  # fmt: skip
    width, height, frames = (848, 480, 31) if bench.is_cuda else (64, 48, 7)
    with torch.device(bench.device):
        vae = mochi.classes["vae"](**({} if bench.is_cuda else small)).eval().requires_grad_(False)
        x_BCTHW = torch.rand(1, 3, frames, height, width) * 2 - 1
    vae = nn.Module.to(vae, dtype)
    results: dict[str, Tensor] = {}

    def encode() -> None:
        results["encode"] = mochi.encode_video(vae, x_BCTHW)[0]

    def decode() -> None:
        results["decode"] = torch.cat(list(mochi.decode_video(vae, results["encode"])), 2)

    shapes = {"encode": (1, *mochi.geometry.latent_shape(width, height, frames)), "decode": tuple(x_BCTHW.shape)}
    for name, run in (("encode", encode), ("decode", decode)):
        seconds = bench.seconds(run)
        peak = bench.peak(run)
        good = bool(torch.isfinite(results[name]).all()) and tuple(results[name].shape) == shapes[name]
        measured = f"{frames / seconds:.1f} frames/s, {peak / GIB:.1f} GiB"
        yield Row(f"{name} {width}x{height}, {short(dtype)}", measured, "finite, right shape, <= 16 GiB",
                  good and peak <= 16 * GIB)  # fmt: skip


# Training


def recipe(bench: Bench, **changes: Any) -> FinetuneManifest:
    """Return a short fine-tune of the tiny base, in fp32, so that devices can be compared."""
    settings = {"steps": 4, "batch_size": 4 if bench.is_cuda else 2, "learning_rate": 1e-4, "checkpoint_every": 2,
                "density": "uniform", "precision": "float32", "ema_decay": 0.9}  # fmt: skip
    given = {"latents": bench.made / "latents", "base": TINY.model_dump(), **settings, **changes}
    return FinetuneManifest.model_validate(given)


def finetune_on_cpu(manifest: FinetuneManifest, run_dir: Path) -> None:
    """Fine-tune in a process that sees no CUDA device."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(manifest.model_dump_json())
    command = [sys.executable, "-m", "flows", "finetune", str(path), "--run-dir", str(run_dir), "--no-prefect"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True, capture_output=True)


def losses(run_dir: Path) -> list[float]:
    """Return the loss of every step."""
    return [loss for _, loss in read_losses(run_dir / "metrics.jsonl") if loss is not None]


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Return the transformer of a checkpoint."""
    (file,) = (run_dir / f"checkpoints/{step:08d}/transformer").glob("*.safetensors")
    return load_file(file)


def check_training(bench: Bench) -> Iterator[Row]:
    """Compare FSDP2 steps of the tiny fine-tune with the same steps on the CPU."""
    manifest = recipe(bench)
    finetune(manifest, bench.folder / "on-device")
    (finetune_on_cpu if bench.is_cuda else finetune)(manifest, bench.folder / "on-cpu")
    pairs = list(zip(losses(bench.folder / "on-device"), losses(bench.folder / "on-cpu"), strict=True))
    worst = max(abs(mine / theirs - 1) for mine, theirs in pairs)
    yield Row(f"losses of {len(pairs)} steps are those of the CPU, fp32", f"{worst:.1e} relative", "<= 1e-03",
              len(pairs) == manifest.steps and worst <= 1e-3)  # fmt: skip


def check_resume(bench: Bench) -> Iterator[Row]:
    """Compare an uninterrupted run with one that was resumed from a checkpoint: every bit, with exact kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for train in ({"method": "full"}, {"method": "lora", "rank": 4}):
            name = train["method"]
            whole, resumed = bench.folder / f"{name}-whole", bench.folder / f"{name}-resumed"
            finetune(recipe(bench, train=train), whole)
            finetune(recipe(bench, train=train, steps=2), resumed)
            finetune(recipe(bench, train=train), resumed)
            files = [sorted((run / "checkpoints/00000004").rglob("*.safetensors")) for run in (whole, resumed)]
            worst = max(furthest(*map(load_file, both)) for both in zip(*files, strict=True))
            same = worst == 0 and losses(whole) == losses(resumed)
            yield Row(f"a resumed run ends with the same bits, {name}", f"{worst:.1e} apart", "0", same)
    finally:
        torch.use_deterministic_algorithms(False)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference between tensors of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def check_memory(bench: Bench) -> Iterator[Row]:
    """Compare the memory of one block as wide as the published ones with what `pusa plan` counts."""
    folder, shape, dtype = bench.folder / "wide", bench.shape, torch.bfloat16
    with torch.device("meta"):
        MochiTransformer3DModel(**bench.one_block).save_config(folder / "transformer")
        AutoencoderKLMochi().save_config(folder / "vae")
    (folder / "text_encoder").symlink_to(builtin_folder("builtin:tiny") / "text_encoder")
    spec = {"weights": str(folder)}

    ways = {
        "full": {},
        "full, with checkpointing": {"activation_checkpointing": 1},
        "lora": {"train": {"method": "lora", "rank": 64}},
    }
    for name, settings in ways.items():
        manifest = FinetuneManifest.model_validate({"base": spec, "batch_size": 1, **settings})
        with process_group(manifest.parallel) as world:
            peak = bench.peak(lambda manifest=manifest, world=world: train_once(manifest, world, shape, dtype))
        yield memory_row(f"a training step, {name}", peak, plan_training(manifest, shape, dtype).total)

    job = {"id": "a", "task": "text_to_video", "prompt": "", **shape.model_dump()}
    planned = plan_generation(GenerateManifest.model_validate({"model": spec, "jobs": [job]}), dtype)
    part = next(part for part in planned.parts if part.part == "transformer")
    transformer = build(Mochi(), locate_config(ModelSpec(**spec), "transformer"))
    transformer = nn.Module.to(transformer, dtype).to_empty(device=bench.device).eval()
    fill(transformer)
    mochi, latent = Mochi(), Mochi().geometry.latent_shape(shape.width, shape.height, shape.num_frames)

    @torch.no_grad()
    def sample_once() -> None:
        z_BCFhw = torch.randn(2, *latent, device=bench.device)
        mochi.predict(
            transformer, z_BCFhw, torch.ones(2, latent[1], device=bench.device), mochi.longest_text(transformer, 2)
        )

    peak = bench.peak(sample_once)
    yield memory_row("a sampling step with guidance", peak and part.weights + peak, part.weights + part.working)


def memory_row(check: str, peak: int, planned: int) -> Row:
    """Return a row that passes where the peak is near the planned bytes; on a CPU it is not measured."""
    expected = f"{planned / GIB:.3f} GiB planned, within 15%"
    if not peak:
        return Row(f"memory of {check}", "runs; measured on CUDA only", expected, True)
    return Row(f"memory of {check}", f"{peak / GIB:.3f} GiB", expected, abs(peak / planned - 1) <= 0.15)


def fill(module: nn.Module) -> None:
    """Give every weight of a module small random values."""
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.02)


def train_once(manifest: FinetuneManifest, world: World, shape: Bucket, dtype: torch.dtype) -> None:
    """Make one step from random weights: forward, backward, AdamW."""
    mochi = Mochi()
    transformer = build(mochi, locate_config(manifest.base, "transformer"))
    configure(transformer, manifest, world.context)
    for weight in transformer.parameters():  # frozen weights are kept in the dtype of the arithmetic
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else dtype)
    shard(transformer, world, dtype)
    transformer.to_empty(device=world.device)
    fill(transformer)
    training = Training.start(transformer.train(), manifest)
    z_BCFhw = torch.randn(
        1, *mochi.geometry.latent_shape(shape.width, shape.height, shape.num_frames), device=world.device
    )
    text = mochi.longest_text(transformer, 1)
    text = replace(text, features=torch.zeros_like(text.features))
    sigma_BF = torch.full((1, z_BCFhw.shape[2]), 0.5, device=world.device)
    frame_errors(mochi.predict(transformer, z_BCFhw, sigma_BF, text), z_BCFhw).mean().backward()
    clip_gradients(transformer, 1.0)
    training.apply()


# Generation and precompute


def demo_jobs(bench: Bench) -> Sequence[Any]:
    """Return the demo's jobs with fewer steps; on a CPU only two of them."""
    manifest = load_manifest(ROOT / "manifests/tiny/generate.yaml", bench.made)
    jobs = [job.model_copy(update={"steps": 8 if bench.is_cuda else 2}) for job in manifest.jobs]
    return jobs if bench.is_cuda else [job for job in jobs if job.id in ("image", "loop")]


def model_in(dtype: torch.dtype, spec: ModelSpec, device: str | torch.device) -> Model:
    """Return a model whose parts are loaded in a dtype of choice."""
    model = Model(spec, device)
    model.dtype = dtype
    return model


def check_generation(bench: Bench) -> Iterator[Row]:
    """Compare the demo's videos with those that the CPU makes from the same seeds."""
    jobs, reference = demo_jobs(bench), model_in(torch.float32, TINY_PUSA, "cpu")
    expected = [decode_job(job, reference, sample_job(job, reference)) for job in jobs]
    for dtype, least in ((torch.float32, 35.0), (torch.bfloat16, 20.0)):
        if dtype is torch.bfloat16 and not bench.is_cuda:
            continue
        model = model_in(dtype, TINY_PUSA, bench.device)
        videos = [decode_job(job, model, sample_job(job, model)) for job in jobs]
        scores = {job.id: psnr(mine, theirs) for job, mine, theirs in zip(jobs, videos, expected, strict=True)}
        worst = min(scores, key=scores.__getitem__)
        yield Row(
            f"{len(jobs)} demo videos are those of the CPU, {short(dtype)}",
            f"PSNR {scores[worst]:.1f} dB or more ({worst})", f">= {least:.0f} dB", scores[worst] >= least,
        )  # fmt: skip


def check_offload(bench: Bench) -> Iterator[Row]:
    """Check that `offload` changes no latents and leaves only the part in use on the device."""
    job = demo_jobs(bench)[1]
    plain, offloaded = (Model(TINY_PUSA.model_copy(update={"offload": on}), bench.device) for on in (False, True))
    z_CFhw, again = sample_job(job, plain), sample_job(job, offloaded)
    yield limit("latents with offload are those without", gap(again, z_CFhw), 1e-2)
    decode_job(job, offloaded, again)
    left = [
        part for part, module in offloaded._loaded.items() if next(module.parameters()).device.type == bench.device.type
    ]
    passed = left == ["vae"] if bench.is_cuda else "vae" in left
    yield Row("parts on the device after decoding with offload", ", ".join(left), "vae", passed)


def check_slots(bench: Bench) -> Iterator[Row]:
    """Compare what a slot makes, on a GPU a process of its own, with this process, and batches with single jobs."""
    prompts = ("a red circle bounces", "a blue square moves left", "a green triangle grows")
    settings = {"task": "text_to_video", "width": 64, "height": 64, "num_frames": 31, "guidance": 2.0}
    settings["steps"] = 4 if bench.is_cuda else 1
    jobs = [{"id": f"j{i}", "prompt": prompt, "seed": i, **settings} for i, prompt in enumerate(prompts)]
    manifest = GenerateManifest.model_validate({"model": TINY_PUSA, "jobs": jobs, "batch_tokens": 0})
    made = {tokens: bench.folder / f"slots-{tokens}" for tokens in (0, 2048)}
    for tokens, run_dir in made.items():
        result = generate(manifest.model_copy(update={"batch_tokens": tokens}), run_dir)
        yield Row(f"videos made with batch_tokens {tokens}", str(len(result.made)), "3", len(result.made) == 3)
    latents = {
        tokens: [read_latents(run_dir / f"videos/{job.id}{LATENTS}") for job in manifest.jobs]
        for tokens, run_dir in made.items()
    }
    model = Model(TINY_PUSA, bench.device)
    here = [sample_job(job, model) for job in manifest.jobs]
    yield limit("latents of a slot are those of this process", max(map(gap, latents[0], here)), 1e-6)
    most = 5e-2 if bench.is_cuda else 1e-3  # a GPU computes in bf16
    yield limit("latents of a batch are those of single jobs", max(map(gap, latents[2048], latents[0])), most)


@contextmanager
def memory_limit(bench: Bench, size: float) -> Iterator[None]:
    """Let this process allocate at most `size` bytes more on the device than it has; on a CPU there is no limit."""
    if not bench.is_cuda:
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + size) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def check_out_of_memory(bench: Bench) -> Iterator[Row]:
    """Let precompute run into a real lack of memory: fewer clips in a pass, then tiles, then a sentence."""
    model = Model(TINY, bench.device)
    size, count = (512, 8) if bench.is_cuda else (64, 2)
    frames = np.stack([draw(random_scene(seed), size, 31) for seed in range(count)])
    _ = model.vae  # is loaded before memory is measured
    one, every = (
        bench.peak(lambda clips=clips: model.posterior(clips), reserved=True) for clips in (frames[:1], frames)
    )
    mean = model.posterior(frames)[0]
    cases = (("fewer clips in a pass", one + (every - one) / 2, False, 0.1), ("tiles", one / 2, True, 1.0))
    for name, room, tiled, most in cases:
        encoder = VideoEncoder(model)
        with memory_limit(bench, room):
            mine, _, tile = encoder.encode(frames)
        error = ((mine - mean).abs().mean() / mean.abs().mean()).item()
        tried = bool(encoder._settings) or not bench.is_cuda
        good = (tile > 0) == tiled and error < most if bench.is_cuda else error == 0
        expected = f"{'a tile' if tiled else 'tile 0'}, < {most} of the mean"
        yield Row(f"out of memory: {name}", f"tile {tile}, {error:.1e} of the mean", expected, tried and good)
    if not bench.is_cuda:
        return
    try:
        with memory_limit(bench, 2**20):
            VideoEncoder(model).encode(frames)
        yield Row("out of memory: nothing fits", "it was encoded", "NoMemoryError", False)
    except NoMemoryError as error:
        yield Row("out of memory: nothing fits", str(error)[:60], "NoMemoryError", True)


CHECKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "parity": check_parity,
    "levels": check_levels,
    "attention": check_attention,
    "hunyuan-video": check_hunyuan_video,
    "vae": check_vae,
    "throughput": check_throughput,
    "training": check_training,
    "resume": check_resume,
    "memory": check_memory,
    "generation": check_generation,
    "offload": check_offload,
    "slots": check_slots,
    "out-of-memory": check_out_of_memory,
}


def run_checks(bench: Bench, names: Sequence[str], on_row: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Run checks one after the other and return their rows. An error is a failed row, and the others still run."""
    rows = []
    for name in names:
        began, first = time.perf_counter(), len(rows)
        try:
            for row in CHECKS[name](bench):
                now = time.perf_counter()
                rows.append(replace(row, seconds=now - began))
                began = now
                on_row(rows[-1])
        except Exception as error:  # noqa: BLE001  # the table must show every other check
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            rows.append(Row(f"{name}, after {len(rows) - first} rows", text, "no error", False))
            on_row(rows[-1])
    return rows


def markdown(rows: Sequence[Row], device: str) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        f"Checks on {device}, torch {torch.__version__}:",
        "",
        "| check | measured | expected | | s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        result = "pass" if row.passed else "**FAIL**"
        lines.append(f"| {row.check} | {row.measured} | {row.expected} | {result} | {math.ceil(row.seconds)} |")
    return "\n".join([*lines, ""])


def print_row(row: Row) -> None:
    """Print a row as soon as it is known."""
    result = "pass" if row.passed else "FAIL"
    print(f"{result}  {row.check:<66}  {row.measured:<40}  {row.expected}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table to this file, as Markdown")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS)
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found; `--device cpu` runs the checks at small sizes", file=sys.stderr)
        return 2
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer takes a GPU where it sees one
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is exact only with this
    torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions are compared with the CPU's
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        rows = run_checks(Bench(torch.device(options.device), Path(folder)), options.only, print_row)
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed, in {time.perf_counter() - began:.0f} s")
    if options.report:
        name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
        options.report.write_text(markdown(rows, name))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
