"""What a call of the pipeline is given: frames or latents of any usual kind, their places and their noise."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError
from torch import Tensor

from pusa.backbones.family import Family
from pusa.diffusion.courses import is_matrix
from pusa.diffusion.sampler import Given
from pusa.errors import ConditionError
from pusa.system.strict import list_problems
from pusa.tasks.base import check_multipliers, per_frame, resolve_positions
from pusa.tasks.text_to_video import TextToVideo
from pusa.video.fit import fit_frames
from pusa.weights.load import is_finite
from pusa.weights.model import Model

# The names of a call's arguments -> those of a job.
JOB_KEYS = {"num_inference_steps": "steps", "guidance_scale": "guidance", "generator": "seed"}
# What calls of diffusers' own pipelines may have -> what a call has instead.
INSTEAD = {
    **dict.fromkeys(("image", "last_image", "video"), "frames are given as conditions=[Condition(frames, position=0)]"),
    **dict.fromkeys(("attention_kwargs", "cross_attention_kwargs"), "`set_adapters` sets the strengths of LoRAs"),
    **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), "prompts are texts, which the call encodes"),
    **dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), "prompts are texts"),
    **dict.fromkeys(("timesteps", "sigmas"), "`noise_schedule` or `levels` decides the levels"),
    "latents": "noise is drawn from `generator`; latents to keep are a Condition",
    "guidance_scale_2": "both transformers have `guidance_scale`",
    "max_sequence_length": "texts have the length that the model was trained with",
}
OUTPUT_TYPES = ("np", "pil", "pt", "latent")
Seed = int | torch.Generator


@dataclass(frozen=True)
class Condition:
    """Frames that a video is given, where, and how noisy.

    Attributes:
        frames: a picture or a clip: of Pillow, a list of these, an array (H, W, 3) or (T, H, W, 3), or a tensor
            (3, H, W) or (T, 3, H, W), in uint8 or floats in [0, 1]; they are cut and scaled to the video's size. Or
            latents (C, F, h, w) of the video's own size, as `output_type="latent"` gives.
        position: the latent frame of the video at which they begin, or one for each latent frame; negative counts from
            the end. The first latent frame is one frame, each other is several.
        multiplier: scales the levels of the given latent frames: 0 keeps them exactly, 0.2 to 0.5 frees their motion. A
            number, one for each latent frame, or a ramp such as "0.1..0.4".
        take: which latent frames of `frames` are given; default: all.
    """

    frames: Any
    position: int | Sequence[int] = 0
    multiplier: float | Sequence[float] | str = 0.0
    take: Sequence[int] | int | None = None


def check_arguments(output_type: str, others: Mapping[str, Any], known: Collection[str]) -> None:
    """Check the kind of output of a call, and that it has no arguments but its own.

    Args:
        output_type: of the call.
        others: arguments that the call does not have. Those of diffusers' own pipelines may be None.
        known: the names of the call's own.

    Raises:
        ConditionError: the output is of no known kind, or there is another argument.
    """
    if output_type not in OUTPUT_TYPES:
        raise ConditionError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")
    for name, value in others.items():
        if name not in INSTEAD:
            near = get_close_matches(name, known, 1)
            raise ConditionError(f"unknown argument {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        if value is not None:
            raise ConditionError(f"{name} was given, which a PusaPipeline does not have: {INSTEAD[name]}")


def read_prompts(prompt: Any, negative: Any, videos_each: Any) -> list[tuple[str, str | None]]:
    """Return the prompt and the negative prompt of each video; None stands for the family's negative prompt.

    Args:
        prompt: a text, or a list of texts.
        negative: None, a text for all, or one for each prompt.
        videos_each: the number of videos of each prompt; None is 1.

    Raises:
        ConditionError: one is of another kind, or their numbers differ.
    """
    for name, texts in (("prompt", prompt), ("negative_prompt", "" if negative is None else negative)):
        listed = isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts)
        if not isinstance(texts, str) and not listed:
            raise ConditionError(f"{name} is {texts!r:.80}; expected a text, or a list of one or more")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else negative
    if len(prompts) != len(negatives):
        raise ConditionError(f"there are {len(negatives)} negative prompts for {len(prompts)} prompts")
    each = 1 if videos_each is None else plain(videos_each)
    if type(each) is not int or each < 1:
        raise ConditionError(f"num_videos_per_prompt is {videos_each!r:.80}; expected a whole number, 1 or more")
    return [pair for pair in zip(prompts, negatives, strict=True) for _ in range(each)]


def read_guidance(guidance_scale: Any, true_cfg_scale: Any, family: Family) -> dict[str, Any]:
    """Return the settings of a job for a call's guidance.

    As in diffusers, `guidance_scale` of a family that was distilled with guidance is a job's `embedded_guidance`, and
    `true_cfg_scale` is of classifier-free guidance.

    Raises:
        ConditionError: another family is given a `true_cfg_scale`.
    """
    if family.job.embedded_guidance is not None:
        return {"guidance": true_cfg_scale, "embedded_guidance": guidance_scale}
    if true_cfg_scale is not None:
        raise ConditionError(
            f"true_cfg_scale was given; {family.name} was not distilled with guidance: give it as guidance_scale"
        )
    return {"guidance": guidance_scale}


def plain(value: Any) -> Any:
    """Return numbers of numpy or torch as Python's, and anything else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def place_conditions(
    conditions: Sequence[Condition], model: Model, width: int, height: int, num_frames: int
) -> tuple[Given, ...]:
    """Encode what is given, and return it at its places.

    Args:
        conditions: of one video.
        model: encodes pixels.
        width: of the video in pixels, as `height`.
        height: of the video.
        num_frames: the length of the video in frames.

    Raises:
        ConditionError: frames are of no known kind, or a position or a multiplier is out of range; it names the
            condition.
    """
    found: list[Given] = []
    geometry = model.backbone.geometry
    latent_frames = geometry.latent_frames(num_frames)
    for number, condition in enumerate(conditions):
        name = f"conditions[{number}]"
        if not isinstance(condition, Condition):
            raise ConditionError(f"{name} is a {type(condition).__name__}; expected a pusa Condition")
        try:
            given = _read(condition, model, width, height, num_frames)
            place = _places(condition, given.shape[1], latent_frames)
            found.append(Given(given, place, _multipliers(condition.multiplier, place)))
        except ConditionError as error:
            raise ConditionError(f"{name}: {error}") from error
    resolve_positions([place for given in found for place in given.place], latent_frames, "positions of the conditions")
    return tuple(found)


def _read(condition: Condition, model: Model, width: int, height: int, num_frames: int) -> Tensor:
    """Return the latents (C, F, h, w) that a condition takes, in the transformer's space."""
    channels, _, *size = model.backbone.geometry.latent_shape(width, height, num_frames)
    frames = condition.frames
    if isinstance(frames, Tensor) and frames.ndim == 5 and len(frames) == 1:
        frames = frames[0]
    if isinstance(frames, Tensor) and frames.ndim == 4 and (frames.shape[0], *frames.shape[2:]) == (channels, *size):
        latents_CFhw = frames.detach().to("cpu", torch.float32)
    else:
        pixels_THWC = as_frames(frames)
        model.backbone.geometry.check_length("the number of frames", len(pixels_THWC))
        latents_CFhw = model.encode(fit_frames(pixels_THWC, width, height))
    if not is_finite(latents_CFhw):
        raise ConditionError("the latents have values that are not finite")
    if condition.take is None:
        return latents_CFhw
    take = plain(condition.take)
    indices = [take] if type(take) is int else take
    if not _are_ints(indices):
        raise ConditionError(f"take is {take!r:.80}; expected a latent frame of what is given, or a list of them")
    return latents_CFhw[:, list(resolve_positions(indices, latents_CFhw.shape[1], "take"))]


def _places(condition: Condition, count: int, latent_frames: int) -> tuple[int, ...]:
    """Return the place of each of `count` given latent frames among those of the video."""
    position = plain(condition.position)
    if type(position) is int:
        first = position + latent_frames if position < 0 else position
        if not 0 <= first <= latent_frames - count:
            raise ConditionError(
                f"position {position} with {count} latent frames is outside the {latent_frames} latent frames of the "
                f"video; allowed are {-latent_frames}..{latent_frames - count}"
            )
        return tuple(range(first, first + count))
    if not _are_ints(position):
        raise ConditionError(f"position is {position!r:.80}; expected a latent frame, or one for each that is given")
    if len(position) != count:
        raise ConditionError(f"position has {len(position)} latent frames for {count} given ones; expected {count}")
    return resolve_positions(position, latent_frames, "position")


def _are_ints(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(plain(one)) is int for one in value)


def _multipliers(value: Any, place: Sequence[int]) -> tuple[float, ...]:
    value = plain(value)
    numbers = [plain(one) for one in value] if isinstance(value, list | tuple) else value
    try:
        return per_frame(check_multipliers(numbers), place, "multiplier")
    except ConditionError:
        raise
    except ValueError as error:
        raise ConditionError(f"multiplier: {error}") from error


def as_frames(value: Any) -> np.ndarray:
    """Return a picture or a clip of any usual kind as frames (T, H, W, 3) uint8.

    Raises:
        ConditionError: it is of no known kind, is empty, or has values out of range.
    """
    if isinstance(value, Image.Image):
        return _of_picture(value)[None]
    listed, in_batch = isinstance(value, list | tuple), isinstance(value, np.ndarray | Tensor) and value.ndim == 5
    if (listed or in_batch) and len(value) == 1:
        return as_frames(value[0])
    if listed and value:
        parts = [as_frames(part) for part in value]
        if {part.shape for part in parts} != {(1, *parts[0].shape[1:])}:
            raise ConditionError("frames is a list of pictures of several sizes, or of clips; expected pictures of one")
        return np.concatenate(parts)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        array = (value.float() if value.is_floating_point() else value).numpy()
        if array.ndim in (3, 4) and array.shape[-3] == 3:
            return _of_array(np.moveaxis(array, -3, -1))
        raise ConditionError(
            f"frames is a tensor {tuple(value.shape)}; expected pixels (3, H, W) or (T, 3, H, W), or latents of the "
            "video's own size"
        )
    if isinstance(value, np.ndarray) and value.ndim in (3, 4) and value.shape[-1] == 3:
        return _of_array(value)
    kind = f"an array {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    raise ConditionError(
        f"frames is {kind}; expected a picture of Pillow, a list of them, an array (H, W, 3) or (T, H, W, 3), or a "
        "tensor (3, H, W), (T, 3, H, W) or of latents; `diffusers.utils.load_image` and `load_video` read files"
    )


def _of_picture(picture: Image.Image) -> np.ndarray:
    """Return (H, W, 3) uint8, upright, over black where it is transparent."""
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return np.array(picture.convert("RGB"))


def _of_array(array: np.ndarray) -> np.ndarray:
    """Return an array (H, W, 3) or (T, H, W, 3) as (T, H, W, 3) uint8."""
    array = array if array.ndim == 4 else array[None]
    if not array.size:
        raise ConditionError(f"frames is empty: {array.shape}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ConditionError(f"frames has dtype {array.dtype}; expected uint8, or floats in [0, 1]")
    low, high = float(array.min()), float(array.max())  # of NaN both are NaN
    if not (low >= 0 and high <= 1):
        raise ConditionError(f"frames has floats from {low:g} to {high:g}; expected [0, 1], or uint8")
    return np.ascontiguousarray((array.astype(np.float32) * 255).round().astype(np.uint8))


def _seeds(generator: Any, count: int) -> list[Seed]:
    """Return the seed or the generator of each of `count` videos, as the call describes it.

    Raises:
        ConditionError: there are others than `count`, or they are of another kind.
    """
    generator = int(torch.randint(0, 2**62, ())) if generator is None else plain(generator)
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if type(generator) is int:
        return [generator + i for i in range(count)]
    seeds = [plain(one) for one in generator] if isinstance(generator, list | tuple) else [generator]
    if not all(type(one) is int or isinstance(one, torch.Generator) for one in seeds):
        raise ConditionError(
            f"generator is {generator!r:.80}; expected a whole number, a torch.Generator, or a list of these"
        )
    if len(seeds) != count:
        raise ConditionError(f"generator has {len(seeds)} seeds or generators for {count} videos")
    return seeds


def make_jobs(
    prompts: Sequence[tuple[str, str | None]], settings: Mapping[str, Any], generator: Any, family: Family
) -> list[tuple[TextToVideo, torch.Generator | None]]:
    """Return the job of each video, as a manifest has it, and the generator of its noise if it is not its seed's.

    Args:
        prompts: the result of `read_prompts`.
        settings: of all jobs, by a job's keys; None stands for the family's.
        generator: as the call describes it.
        family: of the model.

    Raises:
        ConditionError: a setting is out of range.
    """
    seeds = _seeds(generator, len(prompts))
    given = {key: plain(value) for key, value in settings.items() if value is not None}
    defaults = {"negative_prompt", *settings}
    own_defaults = defaults - {"steps"} if is_matrix(given.get("levels")) else defaults  # a matrix has its own steps
    common = {key: value for key, value in family.job.by_key(family.preset).items() if key in own_defaults} | given
    jobs = []
    for number, ((prompt, negative), seed) in enumerate(zip(prompts, seeds, strict=True)):
        own: dict[str, Any] = {} if isinstance(seed, torch.Generator) else {"seed": seed}
        if negative is not None:
            own["negative_prompt"] = negative
        try:
            job = TextToVideo(id=f"video-{number}", prompt=prompt, **{**common, **own})
        except ValidationError as error:
            names = {value: key for key, value in JOB_KEYS.items()}
            if "embedded_guidance" in settings:
                names |= {"guidance": "true_cfg_scale", "embedded_guidance": "guidance_scale"}
            problems = [line.partition(": ") for line in list_problems(error, TextToVideo)]
            raise ConditionError("; ".join(f"{names.get(key, key)}: {text}" for key, _, text in problems)) from error
        jobs.append((job, seed if isinstance(seed, torch.Generator) else None))
    family.geometry.check(job.width, job.height, job.num_frames)
    return jobs
