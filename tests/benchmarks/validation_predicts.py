"""Ask whether the losses of the validation matrix predict the quality of videos: rank correlations over checkpoints.

LoRAs of a tiny model are trained by recipes that differ in levels and learning rate. Each checkpoint has its losses in
metrics.jsonl. With each, and with the base, videos are made for unseen clips and measured against these clips.

    .venv/bin/python -m tests.benchmarks.validation_predicts [--backbone wan2.1] [--clips 8] [--folder DIR]

A folder keeps runs and measurements, so that a rerun resumes.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pusa.backbones import DEFAULT_BACKBONE, find_family
from pusa.evaluate.cases import quality_cases
from pusa.evaluate.measure import match_given_frames
from pusa.evaluate.metrics import Result
from pusa.evaluate.unseen import round_trip, unseen_scenes, write_unseen_clip
from pusa.finetune.metrics import read_metrics
from pusa.finetune.stage import finetune
from pusa.generate.decode import decode_job
from pusa.generate.sampling import sample_job
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, FinetuneManifest, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.system.files import read_object, write_json
from pusa.tiny.dataset import draw_dataset
from pusa.tiny.shapes import FPS, SIZE, clip_length
from pusa.video.compare import psnr, seam
from pusa.weights.model import Model

# levels, learning rate; each is trained for STEPS steps, with a checkpoint every EVERY.
RECIPES = (
    ("independent", 1e-3),
    ("independent", 1e-4),
    ("ptss(0.8)", 1e-3),
    ("shared", 1e-3),
    ("clean_prefix", 1e-3),
    ("independent", 6e-3),  # too high
)
STEPS, EVERY = 150, 50
# A pattern of the matrix -> the case of the quality report that makes videos of its kind.
CASES = {
    "text_to_video": "text_to_video",
    "image_to_video": "image_to_video",
    "keyframes": "keyframes",
    "extension": "extension",
    "independent": "completion",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of each video")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.folder:
        return run(options, options.folder)
    with tempfile.TemporaryDirectory() as scratch:
        run(options, Path(scratch))


def run(options, folder):
    losses, specs = train(options.backbone, folder)
    measured = {name: measure(name, spec, options, folder) for name, spec in specs.items()}
    show(losses, measured)


def train(backbone, folder):
    """Return by checkpoint its losses, pattern -> (levels,), and its model."""
    family = find_family(backbone)
    base = ModelSpec(weights=family.tiny, backbone=backbone)
    draw_dataset(folder / "drawn", 160)
    settings = ClipSettings(num_frames=clip_length(family.geometry), width=SIZE, height=SIZE, fps=FPS)
    clips = ingest(IngestManifest(source=folder / "drawn" / "videos", clips=settings, backbone=backbone), folder)
    latents = precompute(PrecomputeManifest(clips=clips.table, model=base), folder)
    losses, specs = {}, {"base": base}
    for levels, rate in RECIPES:
        run_dir = folder / f"{levels} {rate:g}"
        manifest = FinetuneManifest.model_validate({
            "latents": latents.table, "base": base, "train": {"method": "lora", "rank": 16}, "levels": levels,
            "learning_rate": rate, "density": "uniform", "steps": STEPS, "batch_size": 16, "warmup_steps": 5,
            "ema_decay": 0.95, "checkpoint_every": EVERY, "keep_checkpoints": STEPS // EVERY,
            "validation": {"held_out": 0.1, "every": EVERY},
        })  # fmt: skip
        finetune(manifest, run_dir)
        for row in read_metrics(run_dir / "metrics.jsonl"):
            if "validation" in row:
                step = row["step"]
                name = f"{levels}, {rate:g}, step {step}" if step else "base"
                losses[name] = row["validation"]
                if step:
                    checkpoint = run_dir / "checkpoints" / f"{step:08d}"
                    specs[name] = ModelSpec(weights=family.tiny, backbone=backbone, lora=str(checkpoint))
    return losses, specs


def measure(name, spec, options, folder):
    """Return by case the mean quality of a model's videos: PSNR of the made frames, worst seam, frames as captioned."""
    record = folder / "measured" / f"{name}.json"
    if made := read_object(record):
        return made
    model = Model(spec)
    geometry = model.backbone.geometry
    record.parent.mkdir(exist_ok=True)
    scenes = list(enumerate(unseen_scenes(options.clips)))
    clips = [write_unseen_clip(scene, record.parent / str(i), clip_length(geometry)) for i, scene in scenes]
    cases = {case.name: case for case in quality_cases(model.backbone.family)}
    round_trips, made = list(map(partial(round_trip, model=model), clips)), {}
    for case in map(cases.__getitem__, CASES.values()):
        values = []
        for clip, returned in zip(clips, round_trips, strict=True):
            job = case.job(clip).model_copy(update={"steps": options.steps})
            video = decode_job(job, model, sample_job(job, model))
            values.append(
                quality(Result(video, clip, returned, geometry, *match_given_frames(job, clip, returned, geometry)))
            )
        made[case.name] = {key: float(np.mean([value[key] for value in values if key in value])) for key in values[0]}
    print(f"{name}: " + json.dumps(made), flush=True)
    write_json(record, made)
    return made


def quality(result):
    inside = np.isin(np.arange(len(result.video)), result.given)
    joins = np.flatnonzero(inside[1:] != inside[:-1])
    seams = [abs(np.log(seam(result.video, int(join)))) for join in joins]  # both a jump and a standstill are faults
    return {
        "made frames, dB": psnr(result.video[~inside], result.clip.frames[~inside]),
        **({"worst seam": max(seams)} if seams else {}),
    }


def show(losses, measured):
    """Print the correlations of a pattern's loss, over all levels and over parts of them, with its videos' quality."""
    names = [name for name in measured if name in losses]
    print(f"\n{len(names)} checkpoints; rank correlation of a pattern's loss with the quality of its videos\n")
    print("| pattern | videos | made frames, all levels | 0.1 | 0.2-0.4 | 0.5-0.9 | seams, 0.5-0.9 |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for pattern, case in CASES.items():
        table = np.array([losses[name][pattern] for name in names])  # (checkpoints, 9 levels)
        similar = [measured[name][case]["made frames, dB"] for name in names]
        parts = (table, table[:, :1], table[:, 1:4], table[:, 4:])
        cells = [f"{-rank_correlation(part.mean(1), similar):.2f}" for part in parts]
        seams = [measured[name][case].get("worst seam") for name in names]
        cells.append("-" if None in seams else f"{rank_correlation(table[:, 4:].mean(1), seams):.2f}")
        print(f"| {pattern} | {case} | {' | '.join(cells)} |")


def rank_correlation(a, b):
    """Return Spearman's rank correlation of two lists without ties."""
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (a, b)))[0, 1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
