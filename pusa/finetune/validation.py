"""Render sheets of a few videos from each checkpoint of a fine-tune, to show what it has learnt so far.

Only a latents table is needed: the latents of its first clips, and the text features of their captions. Shapes: latents
z_CFhw and a clip's x0_CFhw in the transformer's space; videos (T, H, W, 3) uint8.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pusa.backbones import find_family
from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.diffusion.noise_schedules import find_noise_schedule
from pusa.diffusion.sampler import Given, TextFeatures, guided, sample, start_state
from pusa.diffusion.seeds import derived
from pusa.diffusion.windows import whole
from pusa.errors import ManifestError, PartlyFailed, PusaError, TableError, TrainingError, WeightsError
from pusa.finetune.checkpoint import RECORD
from pusa.finetune.measurements import read_measurements
from pusa.finetune.split import Split, split_clips
from pusa.manifest.models import FinetuneManifest, ModelSpec
from pusa.manifest.network import LoraSpec
from pusa.manifest.training import Validation
from pusa.system.failures import Failure, attempt
from pusa.system.files import read_object, sha256_file, write_json
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.system.text import join_lines, printable
from pusa.video.compare import psnr
from pusa.video.media import write_image
from pusa.video.sheets import labelled_strip, stack_pictures, strip_indices, text_banner
from pusa.weights.adapters import find_adapter
from pusa.weights.model import Model

log = logging.getLogger(__name__)
SHEET = "sheet_sha256"  # in a sheet's record; records of earlier versions lack it
SAMPLING = {"clips", "steps", "guidance", "embedded_guidance"}  # what decides the videos of a sheet
EXACT_PSNR = 99  # dB; `psnr` of equal frames
# Kind of video -> the latent frames of the clip that it is given, without noise.
KINDS: dict[str, tuple[int, ...]] = {"text_to_video": (), "image_to_video": (0,), "start_end": (0, -1)}


@dataclass(frozen=True)
class ValidationClip:
    """A row of the table: its caption, the caption's features (1, L, width), and its clean latents x0_CFhw."""

    name: str
    caption: str
    text: TextFeatures
    x0: Tensor

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of videos that leave at least one latent frame to generate."""
        return [kind for kind in KINDS if len(self.given(kind)) < self.x0.shape[1]]

    def given(self, kind: str) -> tuple[int, ...]:
        """Return the latent frames that a video of this kind is given."""
        return tuple(dict.fromkeys(index % self.x0.shape[1] for index in KINDS[kind]))


def validate_after_training(manifest: FinetuneManifest, run_dir: Path) -> None:
    """Render what `validate_checkpoints` does. An error is only logged, since the training is complete."""
    try:
        validate_checkpoints(manifest, run_dir)
    except (PusaError, OSError, RuntimeError) as error:
        log.warning("the training is complete, but its validation failed: %s", error)


def validate_checkpoints(manifest: FinetuneManifest, run_dir: Path) -> list[Path]:
    """Render RUN/validation/<step>.jpg for the base, as step 0, and for each checkpoint that has no sheet yet.

    <step>.json beside it records what it shows. A sheet of other settings or of another checkpoint is rendered again,
    and so is one that lacks videos. A checkpoint that the trainer removes meanwhile is left out.

    Returns:
        The sheets that were rendered.

    Raises:
        PartlyFailed: checkpoints or clips cannot be used; the sheets of all others are rendered.
        StageError: another process renders.
        TableError: the latents table is incomplete or empty.
        WeightsError: the base cannot be used.
        ManifestError: this machine does not have the device.
    """
    manifest = manifest.resolve_paths(run_dir)
    require_device(settings_of(manifest))
    folder = run_dir / "validation"
    with sole_writer(folder):
        try:
            renderer = SheetRenderer(manifest, Table.open(manifest.latents or run_dir / "latents", "rows"), folder)
            checkpoints = sorted((run_dir / "checkpoints").glob("[0-9]" * 8))
            rendered, problems = renderer.render_if_missing(folder / "00000000.jpg", None), []
            for checkpoint in checkpoints:
                made = renderer.try_checkpoint(folder / f"{checkpoint.name}.jpg", checkpoint)
                if not isinstance(made, Failure):
                    rendered += made
                elif checkpoint.is_dir():
                    problems.append(f"{checkpoint}: {made.message}")
                    log.warning("no validation sheet of %s: %s", checkpoint, made.traceback or made.message)
                else:
                    log.warning("%s was removed before its validation sheet was rendered", checkpoint)
        finally:
            torch.cuda.empty_cache()  # a trainer may use the same GPU
    if problems := [*problems, *renderer.problems]:
        raise PartlyFailed(join_lines("checkpoints or clips without a validation sheet:", problems))
    return rendered


def settings_of(manifest: FinetuneManifest) -> Validation:
    """Return the settings of a manifest's validation, by default those of the family's jobs."""
    job = find_family(manifest.base.backbone).job
    return manifest.validation or Validation(guidance=job.guidance, embedded_guidance=job.embedded_guidance)


def require_device(settings: Validation) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ManifestError: with the number of devices.
    """
    device = settings.device
    if device and device.startswith("cuda") and int(device[5:] or 0) >= torch.cuda.device_count():
        raise ManifestError(
            f"validation.device is {device!r}; this machine has {torch.cuda.device_count()} CUDA devices"
        )


class SheetRenderer:
    """Renders sheets with the same clips and VAE, which are loaded when they are first used."""

    def __init__(self, manifest: FinetuneManifest, table: Table, folder: Path) -> None:
        self.manifest, self.table, self.folder = manifest, table, folder
        self.problems: list[str] = []  # why videos are missing
        self.unusable: list[str] = []  # those of clips that no sheet shows
        self.settings = settings_of(manifest)
        self.base = Model(manifest.base, self.settings.device)

    def render_if_missing(self, sheet: Path, checkpoint: Path | None) -> list[Path]:
        """Render the sheet of a checkpoint, or of the base, unless it exists. Return the sheets that were rendered."""
        facts = self._facts(int(sheet.stem), checkpoint)
        recorded = read_object(sheet.with_suffix(".json"))
        is_made = sheet.is_file() and not recorded.get("missing") and facts.items() <= recorded.items()
        if is_made and recorded.get(SHEET, sha256_file(sheet)) == sha256_file(sheet):
            return []
        self._render(sheet, facts, checkpoint)
        return [sheet]

    def try_checkpoint(self, sheet: Path, checkpoint: Path) -> list[Path] | Failure:
        """Render the sheet of a checkpoint as `render_if_missing`; return the failure of one that cannot be used."""

        def render() -> list[Path] | Failure:
            try:
                return self.render_if_missing(sheet, checkpoint)
            except WeightsError as error:  # its own: the base has a sheet already
                return Failure(str(error))

        return attempt(render, self.folder)

    def _facts(self, step: int, checkpoint: Path | None) -> dict[str, Any]:
        """Return everything that decides a sheet. The record of a checkpoint has the hashes of all its files."""
        family = self.base.backbone.family
        return {
            "step": step,
            "checkpoint": sha256_file(checkpoint / RECORD) if checkpoint else None,
            "ema_decay": _ema_decay(checkpoint) if checkpoint else 0.0,
            "base": self.base.fingerprints(*family.transformers, *family.vaes),
            **({"boundary": self.base.boundary} if family.experts else {}),
            "latent_space": self.base.space_name,
            "latents": self.split.measured.table.fingerprint,
            **({"held_out": self.settings.held_out} if self.settings.held_out else {}),
            "seed": self.manifest.seed,
            "noise_schedule": family.job.noise_schedule,
            "sampling": self.settings.model_dump(include=SAMPLING, exclude_none=True),
            **({"losses": losses} if (losses := self._losses(step)) else {}),
        }

    def _losses(self, step: int) -> dict[str, float | None]:
        """Return the losses of held-out clips at a step, by pattern; empty where they were not measured."""
        measured = read_measurements(self.folder.parent / "metrics.jsonl")
        return next((one.values() for one in measured if one.step == step), {})

    def _render(self, sheet: Path, facts: dict[str, Any], checkpoint: Path | None) -> None:
        """Sample all videos, then decode all: the transformer is freed before the VAE is used."""
        latents = self._sample_all(_with_result(self.manifest, checkpoint) if checkpoint else self.manifest.base)

        decay, step = facts["ema_decay"], facts["step"]
        weights = f"moving average of the weights (decay {decay:g})" if decay else "the weights as they are"
        title = f"step {step}, {weights}" if step else "step 0, the base"
        title += f": {self.settings.steps} sampling steps, guidance {self.settings.guidance:g}"
        if self.settings.embedded_guidance is not None:
            title += f", embedded guidance {self.settings.embedded_guidance:g}"
        pictures, videos, missing = [text_banner(title, 800)], [], []
        if values := facts.get("losses"):
            losses = ", ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in values.items())
            pictures.append(text_banner(f"loss of the clips that never train: {losses}", 800))
        for clip, original, latents_by_kind in zip(self.clips, self.originals, latents, strict=True):
            pictures.append(text_banner(f"{clip.name}: {clip.caption or '(no caption)'}", 800))
            if isinstance(original, Failure):
                continue
            pictures.append(_strip(["the clip, as its", "latents decode"], original))
            for kind, sampled in latents_by_kind.items():
                video = sampled if isinstance(sampled, Failure) else self._decode(sampled)
                if isinstance(video, Failure):
                    missing.append(self._note(f"{sheet.name}: {clip.name}, {kind}", video))
                    pictures.append(text_banner(f"{kind}: {video.message}", 800))
                    continue
                similarity = self._compare(clip, kind, video, original)
                pictures.append(_strip(_label(clip, kind, similarity), video))
                videos.append({"clip": clip.name, "kind": kind, **similarity})
        if self._facts(step, checkpoint) != facts:
            raise TrainingError(f"{checkpoint or self.base.spec.weights} was replaced while its sheet was rendered")
        write_image(sheet, stack_pictures(pictures))
        missing = [*self.unusable, *missing]
        lacks = {"missing": missing} if missing else {}
        write_json(sheet.with_suffix(".json"), {**facts, "videos": videos, **lacks, SHEET: sha256_file(sheet)})

    def _decode(self, z_CFhw: Tensor) -> np.ndarray | Failure:
        return attempt(partial(self.base.decode, z_CFhw), self.folder)

    def _note(self, name: str, failure: Failure) -> str:
        """Record a failure of a clip or a video, which the other ones do not wait for; return its line."""
        line = f"{name}: {failure.message}"
        log.warning("no video of %s", f"{name}: {failure.traceback}" if failure.traceback else line)
        self.problems.append(line)
        return line

    @cached_property
    def split(self) -> Split:
        """Return which clips are held out."""

        def open_other(folder: Path) -> Latents:
            return Latents(Table.open(folder, "rows"), self.base.space_name)

        return split_clips(self.settings, Latents(self.table, self.base.space_name), open_other)

    @property
    def latents(self) -> Latents:
        """Return the table that the clips are rows of."""
        return self.split.measured

    @cached_property
    def null_text(self) -> TextFeatures:
        """Return the features of the empty prompt (1, L, width)."""
        return self.latents.null_text()

    @cached_property
    def clips(self) -> list[ValidationClip]:
        """Return the first clips, by name, of the first shape: held-out ones, where there are any."""
        latents = self.latents
        rows = next(iter((self.split.held_out or latents.buckets).values()), [])
        if not rows:
            raise TableError(f"{self.table.folder} has no rows; validation needs at least one clip")
        captions = latents.table.read("rows", ("caption",))["caption"]

        def read(name: str, row: int) -> ValidationClip:
            mean_BCFhw, _ = latents.posterior([row])
            caption, x0_CFhw = printable(captions[row].as_py()), latents.space.enter(mean_BCFhw)[0]
            return ValidationClip(printable(name), caption, latents.text([row]), x0_CFhw)

        clips = []
        for name, row in sorted(zip(latents.clip_ids(rows), rows, strict=True))[: self.settings.clips]:
            clip = attempt(partial(read, name, row), self.folder)
            if isinstance(clip, Failure):
                self.unusable.append(self._note(name, clip))
            else:
                clips.append(clip)
        if not clips:
            raise TableError(join_lines("no clip can be used for validation:", self.problems))
        return clips

    @cached_property
    def originals(self) -> list[np.ndarray | Failure]:
        """Return the clips as their latents decode, or why they do not."""
        decoded = [self._decode(clip.x0) for clip in self.clips]
        for clip, video in zip(self.clips, decoded, strict=True):
            if isinstance(video, Failure):
                self.unusable.append(self._note(clip.name, video))
        return decoded

    def _sample_all(self, spec: ModelSpec) -> list[dict[str, Tensor | Failure]]:
        """Return for each clip the sampled latents by kind, or why there are none."""
        model = Model(spec, self.settings.device)
        for expert in range(len(model.backbone.family.transformers)):
            model.denoiser(expert)  # one that cannot be loaded is no clip's fault
        sampled: list[dict[str, Tensor | Failure]] = [{} for _ in self.clips]
        with Progress("validation", sum(len(clip.kinds) for clip in self.clips)) as progress:
            for clip, latents_by_kind in zip(self.clips, sampled, strict=True):
                for kind in clip.kinds:
                    latents_by_kind[kind] = attempt(partial(self._sample, clip, kind, model), self.folder)
                    progress.advance()
        return sampled

    def _sample(self, clip: ValidationClip, kind: str, model: Model) -> Tensor:
        """Sample one video. Its noise depends on clip and kind only, so that sheets of different steps compare."""
        # "probe" was the name of validation. It seeds the noise, so it stays: the same checkpoint gives the same sheet.
        generator = derived("probe", self.manifest.seed, clip.name, kind)
        noise_CFhw = torch.randn(clip.x0.shape, generator=generator)
        frames = clip.given(kind)
        given = [Given(clip.x0[:, list(frames)], frames, (0.0,) * len(frames))] if frames else []
        start_CFhw, multipliers_F = start_state(given, noise_CFhw)
        schedule = partial(find_noise_schedule(model.backbone.family.job.noise_schedule), self.settings.steps)
        text, dropped = clip.text.to(model.device), torch.zeros(1, dtype=torch.bool, device=model.device)
        # The null prompt that caption dropout trains.
        null = model.backbone.drop_text(text, dropped, self.null_text.to(model.device))
        z_BCFhw = start_CFhw[None].to(model.device)
        for phase in model.phases(schedule(torch.ones_like(multipliers_F)), whole(len(multipliers_F))):
            embedded = self.settings.embedded_guidance
            predict = partial(model.backbone.predict, model.denoiser(phase.expert), embedded_guidance=embedded)
            velocity = guided(predict, text, null, self.settings.guidance)
            z_BCFhw = sample(velocity, z_BCFhw, schedule(multipliers_F), steps=phase.steps)
        return z_BCFhw[0].cpu()

    def _compare(
        self, clip: ValidationClip, kind: str, video: np.ndarray, original: np.ndarray
    ) -> dict[str, float | None]:
        """Return the PSNR against the clip in dB of the given and of the generated frames; None without such frames.

        Given latents stay exact, but a frame is decoded together with those before it, so it may differ.
        """
        given = [t for frame in clip.given(kind) for t in self.base.backbone.geometry.frames_of(frame)]
        generated = sorted(set(range(len(video))) - set(given))
        return {
            name: round(psnr(video[frames], original[frames]), 2) if frames else None
            for name, frames in (("psnr_given", given), ("psnr_made", generated))
        }


def _with_result(manifest: FinetuneManifest, checkpoint: Path) -> ModelSpec:
    """Return the base with a checkpoint's result: its LoRA added, or its transformer, which includes the base's LoRAs.

    Of two transformers, the one that is not trained stays the base's.
    """
    base = manifest.base
    if find_adapter(checkpoint):
        loras = (*base.adapters, LoraSpec(weights=str(checkpoint), expert=manifest.expert))
    else:
        base = base.with_checkpoint(manifest.part, str(checkpoint))
        loras = tuple(lora for lora in base.adapters if lora.expert != manifest.expert)
    return base.model_copy(update={"lora": None, "loras": loras})


def _ema_decay(checkpoint: Path) -> float:
    """Return the decay that a checkpoint records; 0 where its weights are not a moving average."""
    recipe = read_object(checkpoint / RECORD).get("recipe")
    decay = recipe.get("ema_decay") if isinstance(recipe, dict) else None
    return decay if isinstance(decay, float) else 0.0


def _label(clip: ValidationClip, kind: str, similarity: Mapping[str, float | None]) -> list[str]:
    """Return the lines beside a video: its kind, the latent frames that it is given, and its PSNR."""
    given = f"latent {', '.join(map(str, clip.given(kind)))}" if clip.given(kind) else "nothing"
    lines = [kind, f"given {given}"]
    for key, name in (("psnr_given", "given"), ("psnr_made", "made")):
        value = similarity[key]
        if value is not None:
            lines.append(f"{name} PSNR " + ("exact" if value >= EXACT_PSNR else f"{value:.1f} dB"))
    return lines


def _strip(lines: Sequence[str], video: np.ndarray) -> np.ndarray:
    return labelled_strip("\n".join(lines), video[strip_indices(len(video))])
