"""What a fine-tune has learnt so far, to look at: of each checkpoint a sheet of the same few videos, made anew by it.

A latents table is all they take: of its first clips the latents, and the features of their captions. Shapes: latents
z_CFhw and x0_CFhw (those of a clip) in the transformer's space; videos (T, H, W, 3) uint8.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.diffusion.noise_schedules import NOISE_SCHEDULES
from pusa.diffusion.sampler import Given, TextFeatures, guided, sample, start_state
from pusa.errors import ManifestError, PusaError, StageError, TableError
from pusa.finetune.checkpoint import RECORD
from pusa.manifest.models import FinetuneManifest, ModelSpec
from pusa.manifest.training import Validation
from pusa.registry import find
from pusa.system.files import derived_seed, read_json, sha256_file, write_json
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.system.text import printable
from pusa.video.compare import psnr
from pusa.video.media import write_image
from pusa.video.sheets import labelled, shown, stacked, told
from pusa.weights.adapters import find_adapter
from pusa.weights.model import Model

log = logging.getLogger(__name__)
NOISE_SCHEDULE = "linear_quadratic"
EXACT = 99  # dB: what `psnr` says of equal frames
# What is made of a clip, and which of its latent frames are given for that, exactly.
KINDS: dict[str, tuple[int, ...]] = {"text_to_video": (), "image_to_video": (0,), "start_end": (0, -1)}


@dataclass(frozen=True)
class Clip:
    """A row of the table: its caption, as text and as features (1, L, width), and its clean latents."""

    name: str
    caption: str
    text: TextFeatures
    x0: Tensor

    @property
    def kinds(self) -> list[str]:
        """What can be made of it: where all latent frames are given, nothing is."""
        return [kind for kind in KINDS if len(self.given(kind)) < self.x0.shape[1]]

    def given(self, kind: str) -> tuple[int, ...]:
        """Which latent frames a video of a kind is given."""
        return tuple(dict.fromkeys(index % self.x0.shape[1] for index in KINDS[kind]))


def validate_checkpoints(manifest: FinetuneManifest, run_dir: Path) -> list[Path]:
    """Make a sheet RUN/validation/<step>.jpg of the base, as step 0, and of each checkpoint, where there is none yet.

    Beside it <step>.json says what it is of; one made with other settings, or of another checkpoint, is made again.
    A checkpoint that the trainer removes meanwhile is left out.

    Raises:
        StageError: another process is at it, or checkpoints cannot be used; the others have their sheets then.
        TableError: the latents table is not complete, or empty.
        WeightsError: the base cannot be used.
        ManifestError: the device is not there.
    """
    manifest = manifest.resolve_paths(run_dir)
    require_device(manifest.validation or Validation())
    with sole_writer(run_dir / "validation"):
        try:
            return _make_missing(manifest, run_dir)
        finally:
            torch.cuda.empty_cache()  # a trainer may work beside it


def require_device(settings: Validation) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        ManifestError: with how many there are.
    """
    device = settings.device
    if device and device.startswith("cuda") and int(device[5:] or 0) >= torch.cuda.device_count():
        raise ManifestError(f"validation.device is {device!r}; of CUDA devices there are {torch.cuda.device_count()}")


def _make_missing(manifest: FinetuneManifest, run_dir: Path) -> list[Path]:
    table = Table.open(manifest.latents or run_dir / "latents", "rows")
    studio = _Studio(manifest, table)
    checkpoints = sorted((run_dir / "checkpoints").glob("[0-9]" * 8))
    made, wrong = studio.make_missing(run_dir / "validation/00000000.jpg", None), []
    for checkpoint in checkpoints:
        try:
            made += studio.make_missing(run_dir / f"validation/{checkpoint.name}.jpg", checkpoint)
        except (PusaError, OSError) as error:
            if checkpoint.is_dir():
                wrong.append(f"{checkpoint}: {error}")
                log.warning("no probe of %s", wrong[-1])
            else:
                log.warning("%s was removed before there was a probe of it", checkpoint)
    if wrong:
        raise StageError("there is no probe of\n  " + "\n  ".join(wrong))
    return made


def _is_made(sheet: Path, facts: Mapping[str, Any]) -> bool:
    there = read_json(sheet.with_suffix(".json"))
    return sheet.is_file() and isinstance(there, dict) and facts.items() <= there.items()


class _Studio:
    """What all sheets share: the clips, and the VAE. Each is loaded when first asked for."""

    def __init__(self, manifest: FinetuneManifest, table: Table) -> None:
        self.manifest, self.table = manifest, table
        self.settings = manifest.validation or Validation()
        self.base = Model(manifest.base, self.settings.device)

    def make_missing(self, sheet: Path, checkpoint: Path | None) -> list[Path]:
        """Make the sheet of a checkpoint, or of the base, unless it is there; which were made."""
        facts = self.facts(int(sheet.stem), checkpoint)
        if _is_made(sheet, facts):
            return []
        self.make(sheet, facts, checkpoint)
        return [sheet]

    def facts(self, step: int, checkpoint: Path | None) -> dict[str, Any]:
        """What a sheet is of. A checkpoint's own list of its files, with their hashes, stands for it."""
        return {
            "step": step,
            "checkpoint": sha256_file(checkpoint / RECORD) if checkpoint else None,
            "ema_decay": _ema_decay(checkpoint) if checkpoint else 0.0,
            "base": self.base.fingerprints("transformer", "vae"),
            "latent_space": self.base.space_name,
            "latents": self.table.fingerprint,
            "seed": self.manifest.seed,
            "noise_schedule": NOISE_SCHEDULE,
            "sampling": self.settings.model_dump(exclude={"device"}),
        }

    def make(self, sheet: Path, facts: dict[str, Any], checkpoint: Path | None) -> None:
        """Sample all, then decode all: the transformer is gone before the VAE works."""
        spec = self.manifest.base
        latents = self._sampled(_of_checkpoint(spec, checkpoint) if checkpoint else spec)
        pictures, videos = [told(self._title(facts), 800)], []
        for clip, original, of_kind in zip(self.clips, self.originals, latents, strict=True):
            pictures += [
                told(f"{clip.name}: {clip.caption or '(no caption)'}", 800),
                _strip(["the clip, as its", "latents decode"], original),
            ]
            for kind, z_CFhw in of_kind.items():
                video = self.base.decode(z_CFhw)
                likeness = self._likeness(clip, kind, video, original)
                pictures.append(_strip(_label(clip, kind, likeness), video))
                videos.append({"clip": clip.name, "kind": kind, **likeness})
        write_image(sheet, stacked(pictures))
        write_json(sheet.with_suffix(".json"), {**facts, "videos": videos})

    @cached_property
    def clips(self) -> list[Clip]:
        """Those of the table's first shape, as many as are wanted, in the order of their names."""
        latents = Latents(self.table, self.base.space_name)
        rows = next(iter(latents.buckets.values()), [])
        if not rows:
            raise TableError(f"{self.table.folder} holds no rows; a probe takes its clips from there")
        captions = self.table.read("rows", ("caption",))["caption"]
        named = sorted(zip(latents.clip_ids(rows), rows, strict=True))[: self.settings.clips]
        return [_read_clip(latents, row, name, captions[row].as_py()) for name, row in named]

    @cached_property
    def originals(self) -> list[np.ndarray]:
        """The clips themselves, as their latents decode."""
        return [self.base.decode(clip.x0) for clip in self.clips]

    def _sampled(self, spec: ModelSpec) -> list[dict[str, Tensor]]:
        """Of each clip, kind by kind, what a transformer makes of it."""
        model = Model(spec, self.settings.device)
        sampled: list[dict[str, Tensor]] = [{} for _ in self.clips]
        with Progress("validation", sum(len(clip.kinds) for clip in self.clips)) as progress:
            for clip, of_kind in zip(self.clips, sampled, strict=True):
                for kind in clip.kinds:
                    of_kind[kind] = self._sample(clip, kind, model)
                    progress.advance()
        return sampled

    def _sample(self, clip: Clip, kind: str, model: Model) -> Tensor:
        """The noise is that of clip and kind, so that sheets of different steps compare."""
        generator = Generator().manual_seed(derived_seed("probe", self.manifest.seed, clip.name, kind))
        noise_CFhw = torch.randn(clip.x0.shape, generator=generator)
        place = clip.given(kind)
        given = [Given(clip.x0[:, list(place)], place, (0.0,) * len(place))] if place else []
        start_CFhw, multipliers_F = start_state(given, noise_CFhw)
        levels_NF = find(NOISE_SCHEDULES, NOISE_SCHEDULE, "noise schedule")(self.settings.steps, multipliers_F)
        text = TextFeatures(clip.text.features.to(model.device), clip.text.mask.to(model.device))
        # What caption dropout trains, rather than T5's features of an empty prompt: the table need not hold those.
        null = model.backbone.drop_text(text, torch.zeros(1, dtype=torch.bool, device=model.device))
        predict = partial(model.backbone.predict, model.transformer)
        velocity = guided(predict, text, null, self.settings.guidance)
        return sample(velocity, start_CFhw[None].to(model.device), levels_NF)[0].cpu()

    def _likeness(self, clip: Clip, kind: str, video: np.ndarray, original: np.ndarray) -> dict[str, float | None]:
        """PSNR against the clip in dB: of the frames whose latents were given, and of those that were made.

        Given latents stay exactly as they are, but each decodes together with those before it.
        """
        given = [t for frame in clip.given(kind) for t in self.base.backbone.geometry.frames_of(frame)]
        made = sorted(set(range(len(video))) - set(given))
        return {
            name: round(psnr(video[frames], original[frames]), 2) if frames else None
            for name, frames in (("psnr_given", given), ("psnr_made", made))
        }

    def _title(self, facts: Mapping[str, Any]) -> str:
        decay = facts["ema_decay"]
        weights = f"moving average of the weights (decay {decay:g})" if decay else "the weights as they are"
        what = f"step {facts['step']}, {weights}" if facts["step"] else "step 0, the base"
        return f"{what}: {self.settings.steps} sampling steps, guidance {self.settings.guidance:g}"


def _ema_decay(checkpoint: Path) -> float:
    """Of the weights that a checkpoint holds, as it says itself; 0 where they are no moving average."""
    record = read_json(checkpoint / RECORD)
    recipe = record.get("recipe") if isinstance(record, dict) else None
    decay = recipe.get("ema_decay") if isinstance(recipe, dict) else None
    return decay if isinstance(decay, float) else 0.0


def _of_checkpoint(base: ModelSpec, checkpoint: Path) -> ModelSpec:
    """The base with the checkpoint's LoRA, or with its transformer, which holds whatever LoRA the base has."""
    if find_adapter(checkpoint):
        return base.model_copy(update={"lora": str(checkpoint)})
    return base.model_copy(update={"checkpoint": str(checkpoint), "lora": None})


def _read_clip(latents: Latents, row: int, name: str, caption: str) -> Clip:
    mean_BCFhw, _ = latents.posterior([row])
    return Clip(
        printable(name), printable(caption), TextFeatures(*latents.text([row])), latents.space.enter(mean_BCFhw)[0]
    )


def _label(clip: Clip, kind: str, likeness: Mapping[str, float | None]) -> list[str]:
    """What a video is: its kind, the latent frames it is given, and how like the clip's its frames are."""
    given = f"latent {', '.join(map(str, clip.given(kind)))}" if clip.given(kind) else "nothing"
    names = {"psnr_given": "given", "psnr_made": "made"}
    values = [f"{name} PSNR {_decibels(value)}" for key, name in names.items() if (value := likeness[key]) is not None]
    return [kind, f"given {given}", *values]


def _decibels(value: float) -> str:
    return "exact" if value >= EXACT else f"{value:.1f} dB"


def _strip(lines: Sequence[str], video: np.ndarray) -> np.ndarray:
    return labelled("\n".join(lines), video[shown(len(video))])
