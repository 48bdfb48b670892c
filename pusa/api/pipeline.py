"""Use a model as a pipeline of diffusers: prompts and given frames in, videos out, equal to those of a manifest.

The modules are the pipeline's, so that everything of diffusers that works on modules does; preparing, sampling and
decoding are those of `pusa generate`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pusa.api.given import Condition, Seed, check_arguments, make_jobs, place_conditions, read_guidance, read_prompts
from pusa.api.loras import open_lora
from pusa.api.modules import ModulesModel, adopt, classes_of, diffusers_name, find_family_of, find_space
from pusa.backbones import all_families, all_transformers
from pusa.backbones.base import find_backbone
from pusa.backbones.family import Family
from pusa.diffusion.sampler import TextFeatures, multipliers_of
from pusa.diffusion.windows import whole
from pusa.errors import ConditionError, NotFiniteError, WeightsError
from pusa.generate.sampling import Prepared, PreparedPass, Saved, State, levels_of, sample_together
from pusa.tasks.base import Pass
from pusa.tasks.text_to_video import TextToVideo
from pusa.weights.resolve import builtin_folder
from pusa.weights.source import base_of

__all__ = ["Condition", "PusaPipeline", "PusaPipelineOutput"]
TRANSFORMERS = all_transformers()
TEXT_ENCODERS = tuple(dict.fromkeys(part for family in all_families() for part in family.text_encoders))
if TYPE_CHECKING:
    from typing import Any as TextEncoder
    from typing import Any as Transformer
    from typing import Any as Vae
else:
    Transformer, Vae, TextEncoder = classes_of(*TRANSFORMERS), classes_of("vae"), classes_of(*TEXT_ENCODERS)


@dataclass
class PusaPipelineOutput(BaseOutput):
    """The videos that were made.

    Attributes:
        frames: by `output_type`: "np", floats in [0, 1] (B, T, H, W, 3); "pt", the same as a tensor (B, T, 3, H, W);
            "pil", B lists of T pictures; "latent", latents (B, C, F, h, w).
    """

    frames: Any


class _Interrupted(Exception):
    """Ends sampling with the latents as they are."""


class PusaPipeline(DiffusionPipeline, LoraBaseMixin):  # type: ignore[misc]  # diffusers has no types
    """A pipeline of a vectorized transformer: each latent frame has a noise level of its own.

    The family is found from the transformers. Those of diffusers' classes become Pusa's without a copy of the weights.

    Args:
        tokenizer: the tokenizer of the text encoder.
        text_encoder: turns prompts into features.
        tokenizer_2: the tokenizer of the second text encoder.
        text_encoder_2: the second one, of a family with two.
        vae: turns frames into latents and back.
        transformer: the denoiser; of two, the one for high levels.
        transformer_2: the one for low levels, of a family with two.
        scheduler: kept for diffusers' own pipelines; the levels are those of a `noise_schedule`.
        boundary_ratio: the level below which `transformer_2` denoises; default: the family's.
        latent_space: "dit" or "vae", the latent space of the transformers; default: what their files record, else the
            family's first.

    Raises:
        WeightsError: the modules are of no known family, or do not fit each other.
    """

    model_cpu_offload_seq = "->".join((*TEXT_ENCODERS, *TRANSFORMERS, "vae"))
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012  diffusers joins such lists
    _optional_components = ["scheduler", "tokenizer_2", *TEXT_ENCODERS[1:], *TRANSFORMERS[1:]]  # noqa: RUF012
    _lora_loadable_modules = list(TRANSFORMERS)  # noqa: RUF012

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: TextEncoder,
        vae: Vae,
        transformer: Transformer,
        scheduler: SchedulerMixin | None = None,
        transformer_2: Transformer | None = None,
        boundary_ratio: float | None = None,
        latent_space: str | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        given = {"transformer": transformer, "transformer_2": transformer_2}
        family = find_family_of({part: module for part, module in given.items() if module is not None})
        backbone = find_backbone(family.name)
        parts = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2, **given}
        adopted = {name: part if part is None else adopt(backbone, name, part) for name, part in parts.items()}
        self.register_modules(tokenizer=tokenizer, tokenizer_2=tokenizer_2, scheduler=scheduler, **adopted)
        space = find_space(family, {part: adopted[part] for part in family.transformers}, latent_space)
        if boundary_ratio is not None and not (family.experts and 0 <= boundary_ratio <= 1):
            raise WeightsError(
                f"boundary_ratio is {boundary_ratio!r}; expected a number from 0 to 1, of a model with two transformers"
            )
        boundary = family.boundary if boundary_ratio is None else boundary_ratio
        self.register_to_config(boundary_ratio=boundary, latent_space=space)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> "PusaPipeline":
        """Load a pipeline from a folder in diffusers' layout, a repository on the hub, or "builtin:tiny".

        Args:
            pretrained_model_name_or_path: of a base, or of `pusa weights export --to pipeline`. Its index may name
                diffusers' own pipeline and classes.
            **options: those of `DiffusionPipeline.from_pretrained`, such as a fine-tuned `transformer`. The default
                `dtype` of all modules is fp32, as of a manifest's model on a CPU; on a GPU that has bf16.

        Raises:
            WeightsError: a built-in model is unknown or has no parts of its own; or as `PusaPipeline`.
        """
        name = pretrained_model_name_or_path
        if isinstance(name, str) and name.startswith("builtin:"):
            folder = builtin_folder(name)
            if base := base_of(folder):
                raise WeightsError(f"{name} is a fine-tune; load builtin:{base.name}, and this as transformer or LoRA")
            name = str(folder)
        if not {"dtype", "torch_dtype"} & set(options):  # transformers would keep the dtype of the files
            options["dtype"] = torch.float32
        made: PusaPipeline = super().from_pretrained(name, **options)
        return made

    def register_modules(self, **modules: Any) -> None:
        """Register modules; the index names diffusers' classes, with which every reader can load them again."""
        super().register_modules(**modules)
        names = {part: diffusers_name(module) for part, module in modules.items() if module is not None}
        self.register_to_config(**{part: name for part, name in names.items() if name})

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save all modules and the index, as `DiffusionPipeline.save_pretrained`.

        Raises:
            WeightsError: a transformer has LoRAs beside its weights, which no reader would find.
        """
        if adapters := {part: names for part, names in self.get_list_adapters().items() if names}:
            raise WeightsError(
                f"LoRAs are loaded beside the weights: {adapters}; call fuse_lora() and unload_lora_weights() before, "
                "or unload_lora_weights() alone to save without them"
            )
        super().save_pretrained(save_directory, **options)

    @property
    def family(self) -> Family:
        """Return the family of the transformers."""
        return find_family_of({part: module for part in TRANSFORMERS if (module := getattr(self, part)) is not None})

    @property
    def interrupt(self) -> bool:
        """Return whether sampling ends after the step under way: a callback may set `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Return the number of denoising steps of the last call, for callbacks."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Return what was given as `guidance_scale` to the last call, for callbacks."""
        embedded = self._job.embedded_guidance
        return self._job.guidance if embedded is None else embedded

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str | Sequence[str] | None = None,
        conditions: Condition | Sequence[Condition] | None = None,
        num_frames: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        noise_schedule: str | None = None,
        levels: Any = None,
        num_videos_per_prompt: int = 1,
        generator: Seed | Sequence[Seed] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **others: Any,
    ) -> PusaPipelineOutput | tuple[Any]:
        """Make videos: one for each prompt, all with the same conditions. Defaults are the family's, as in a manifest.

        Args:
            prompt: what the video shows; a list makes several at once.
            negative_prompt: what guidance moves away from, in all videos or, as a list, in those of each prompt.
            conditions: the given frames, none for text to video.
            num_frames, width, height: the length in frames, the family's temporal step * k + 1; the size in pixels.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance; of a family distilled with guidance, its `embedded_guidance`.
            true_cfg_scale: of classifier-free guidance, of such a family; 1 leaves out the null pass.
            noise_schedule, levels: as of a job; a matrix of levels may be an array or a tensor.
            num_videos_per_prompt: how many videos each prompt makes.
            generator: a number is the `seed` of the first video's job, and each further video has the next one; a
                generator of torch is drawn from; a list has one for each video. Default: a seed from torch's own.
            output_type, return_dict: "np", "pil", "pt" or "latent"; as in diffusers.
            callback_on_step_end: called after each step as (pipeline, step, timestep, {"latents": latents}); it may
                return other latents in such a mapping, or set the pipeline's `_interrupt`.
            callback_on_step_end_tensor_inputs: "latents", or none.
            **others: what diffusers' own pipelines have beside these; they are refused with what to give instead.

        Raises:
            ConditionError: a size, a condition or another argument is out of range.
            WeightsError: a part is missing or does not fit.
            NotFiniteError: a part of the model computes values that are not finite.
        """
        check_arguments(output_type, others, signature(PusaPipeline.__call__).parameters)
        model, self._interrupt = self._model(), False
        settings = dict[str, Any](width=width, height=height, num_frames=num_frames, steps=num_inference_steps)
        guidance = read_guidance(guidance_scale, true_cfg_scale, self.family)
        settings |= {"noise_schedule": noise_schedule, "levels": levels, **guidance}
        jobs = make_jobs(read_prompts(prompt, negative_prompt, num_videos_per_prompt), settings, generator, self.family)
        try:
            prepared = self._prepare(model, jobs, conditions)
            latents = self._sample(model, prepared, callback_on_step_end, callback_on_step_end_tensor_inputs)
            frames = _decode(model, latents, output_type)
        finally:
            self.maybe_free_model_hooks()
        return PusaPipelineOutput(frames=frames) if return_dict else (frames,)

    def _model(self) -> ModulesModel:
        """Return the modules as they are now as a model; diffusers' classes that were set since become ours."""
        family = self.family
        backbone = find_backbone(family.name)
        for part in backbone.classes:
            module = getattr(self, part, None)
            if module is not None and (own := adopt(backbone, part, module)) is not module:
                self.register_modules(**{part: own})
        space, boundary = self.config.latent_space, self.config.boundary_ratio
        return ModulesModel(family, self.components, self._execution_device, space, boundary)

    def _prepare(
        self, model: ModulesModel, jobs: Sequence[tuple[TextToVideo, torch.Generator | None]], conditions: Any
    ) -> list[Prepared]:
        """Encode prompts and given frames: each once."""
        conditions = () if conditions is None else [conditions] if isinstance(conditions, Condition) else conditions
        if not isinstance(conditions, Sequence):
            raise ConditionError(f"conditions is of type {type(conditions).__name__}; expected a list of Condition")

        @cache
        def encode(text: str) -> TextFeatures:
            return model.encode_text([text if text.strip() else ""]).to("cpu", model.dtype)

        texts = [(encode(job.prompt), None if job.guidance == 1 else encode(job.negative_prompt)) for job, _ in jobs]
        self._job = job = jobs[0][0]
        given = place_conditions(conditions, model, job.width, job.height, job.num_frames)
        frames = model.backbone.geometry.latent_frames(job.num_frames)
        run = Pass((), whole(frames)).with_levels(job.levels, multipliers_of(given, frames).tolist())
        passes = (PreparedPass(run, given),)
        return [Prepared(job, *text, passes, generator) for (job, generator), text in zip(jobs, texts, strict=True)]

    def _sample(
        self, model: ModulesModel, prepared: Sequence[Prepared], callback: Any, inputs: Sequence[str]
    ) -> list[Tensor]:
        """Return the latents of each video, or those of the step after which it was interrupted."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            inputs = callback.tensor_inputs
        if unknown := set(inputs) - set(self._callback_tensor_inputs):
            raise ConditionError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; allowed is latents")
        job, run, stopped = prepared[0].job, prepared[0].passes[0].run, list[Tensor]()
        levels_N = levels_of(job, run, torch.ones(len(run.timeline.starts))).amax(1)
        self._num_timesteps = len(levels_N) - 1

        def on_state(step: int, z_BCFhw: Tensor) -> None:
            bar.update()
            if callback is not None:
                tensors = {"latents": z_BCFhw} if "latents" in inputs else {}
                changed = callback(self, step, 1000 * levels_N[step], tensors)
                if isinstance(changed, Mapping) and (latents := changed.get("latents")) is not None:
                    if latents.shape != z_BCFhw.shape:
                        shape = tuple(z_BCFhw.shape)
                        raise ConditionError(f"the callback's latents are {tuple(latents.shape)}; expected {shape}")
                    z_BCFhw.copy_(latents)
            if self._interrupt:
                stopped.extend(z_BCFhw.float().cpu())
                raise _Interrupted

        with self.progress_bar(total=self._num_timesteps) as bar:
            try:
                made = sample_together(prepared, model, saved=_Steps(on_state))
            except _Interrupted:
                return stopped
        if errors := [one for one in made if isinstance(one, NotFiniteError)]:
            raise errors[0]
        return [one for one in made if isinstance(one, Tensor)]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        strength: float = 1.0,
        *,
        weight_name: str | None = None,
        expert: str | None = None,
        load_into_transformer_2: bool = False,
    ) -> None:
        """Load a LoRA of any naming that Pusa reads as an adapter, beside those that are loaded.

        `set_adapters`, `fuse_lora`, `unload_lora_weights` and `delete_adapters` are diffusers' own.

        Args:
            pretrained_model_name_or_path_or_dict: a checkpoint of `pusa finetune`, a folder, a file, a repository on
                the hub, or tensors by their names.
            adapter_name: for `set_adapters`; default: a number.
            strength: multiplies what the LoRA adds, as in a manifest.
            weight_name: the file in the folder or the repository.
            expert: the transformer, of a family that has two: high or low; default: the one that the LoRA records.
            load_into_transformer_2: diffusers' way to name the expert for low levels.

        Raises:
            WeightsError: it cannot be read or does not fit, or it is not known which transformer it is for.
        """
        family = self.family
        lora = open_lora(pretrained_model_name_or_path_or_dict, weight_name, strength)
        if load_into_transformer_2:
            expert = family.expert_of(TRANSFORMERS[-1]) or TRANSFORMERS[-1]
        expert = expert or (lora.record.get("expert") if family.experts else None)
        if (expert or family.experts) and expert not in family.experts:
            raise WeightsError(
                f"the LoRA's expert is {expert!r}; {family.name} has "
                f"{' and '.join(family.experts) or 'one transformer'}: give `expert` accordingly"
            )
        part = family.experts[expert] if expert else family.transformers[0]
        transformer = getattr(self, part)
        lora.require_fit(transformer, family, part, self.config.latent_space)
        transformer.load_lora_adapter(
            lora.tensors, prefix=None, adapter_name=adapter_name, metadata=lora.settings, _pipeline=self
        )

    def fuse_lora(self, components: Sequence[str] | None = None, **options: Any) -> None:
        """Add the loaded LoRAs to the weights, by default of every transformer; options: as in diffusers."""
        super().fuse_lora(components=list(components or self.family.transformers), **options)

    def unfuse_lora(self, components: Sequence[str] | None = None, **options: Any) -> None:
        """Take fused LoRAs out of the weights again, by default of every transformer."""
        super().unfuse_lora(components=list(components or self.family.transformers), **options)

    def enable_sequential_cpu_offload(self, *args: Any, **options: Any) -> None:
        """Refuse: the modules' weights would be on no device that inputs could be made on."""
        raise NotImplementedError("PusaPipeline offloads whole modules only; use enable_model_cpu_offload()")

    def enable_group_offload(self, *args: Any, **options: Any) -> None:
        """Refuse, as `enable_sequential_cpu_offload`."""
        self.enable_sequential_cpu_offload()


class _Steps(Saved):
    """Hand each state of sampling to a function instead of saving it."""

    def __init__(self, on_state: Callable[[int, Tensor], None]) -> None:
        self._on_state = on_state

    state = None

    def keep(self, state: State, total: int) -> None:
        """Call the function with the number of the step and the latents (B, C, F, h, w)."""
        assert state.z_BCFhw is not None
        self._on_state(state.step - 1, state.z_BCFhw)


def _decode(model: ModulesModel, latents: Sequence[Tensor], output_type: str) -> Any:
    """Return videos as diffusers' pipelines return them."""
    if output_type == "latent":
        return torch.stack(list(latents))
    frames_BTHWC = np.stack([model.decode(z_CFhw) for z_CFhw in latents])
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in frames_BTHWC]
    floats_BTHWC = frames_BTHWC.astype(np.float32) / 255
    return torch.from_numpy(floats_BTHWC).movedim(-1, 2) if output_type == "pt" else floats_BTHWC
