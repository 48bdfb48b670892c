"""Describe a family of base models without loading it: geometry, defaults, presets, parts, layouts. No torch here.

A family's folder `backbones/<name>/` owns everything that only this family knows. Its `__init__.py` describes it with
the types of this file, and one line in `pusa.backbones.BACKBONES` registers it.
"""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Literal

from pusa.errors import ConditionError

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape
DensityName = Literal["linear_quadratic", "shifted", "uniform", "logit_normal"]  # of `diffusion.timesteps.DENSITIES`

MAX_PIXELS = 1 << 36  # of a whole video: what is larger is a mistake


def import_lazily(module: str, classes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a family's module, so that describing the family needs no torch.

    Args:
        module: the name of the family's module.
        classes: name -> the module that it is imported from when it is first used.
    """

    def find(name: str) -> Any:
        if name not in classes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(classes[name]), name)

    return find


@dataclass(frozen=True)
class Geometry:
    """How pixels become latents: compression in space and time, the transformer's patch, and latent channels."""

    spatial: int
    temporal: int
    patch: int
    channels: int

    @property
    def pixel_step(self) -> int:
        """Return the number of pixels that width and height must be multiples of."""
        return self.spatial * self.patch

    def latent_frames(self, num_frames: int) -> int:
        """Return the latent frames F of a clip of `num_frames` = temporal * (F - 1) + 1 frames."""
        return (num_frames - 1) // self.temporal + 1

    def num_frames(self, latent_frames: int) -> int:
        """Return the number of frames that `latent_frames` decode to."""
        return self.temporal * (latent_frames - 1) + 1

    def frames_of(self, latent_frame: int) -> list[int]:
        """Return the frames of a clip that a latent frame decodes to: one for the first, `temporal` for any other."""
        end = self.num_frames(latent_frame + 1)
        return list(range(max(0, end - self.temporal), end))

    def frames_of_ring(self, latent_frame: int, latent_frames: int) -> list[int]:
        """Return the same in a loop of `latent_frames`; `Model.decode_ring` starts it in the middle of the first."""
        first = latent_frame * self.temporal - self.temporal // 2
        return [(first + i) % (latent_frames * self.temporal) for i in range(self.temporal)]

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        """Return the shape (C, F, h, w) of a clip's latents."""
        return self.channels, self.latent_frames(num_frames), height // self.spatial, width // self.spatial

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Return the number of tokens of latents (B, C, F, h, w), over all samples."""
        samples, _, frames, height, width = latent_shape
        return samples * frames * (height // self.patch) * (width // self.patch)

    def check(self, width: int, height: int, num_frames: int) -> None:
        """Check that the model accepts a size and a length.

        Raises:
            ConditionError: every problem, with the nearest legal sizes and the two nearest legal lengths.
        """
        wrong = [self._wrong_size(name, value) for name, value in (("width", width), ("height", height))]
        try:
            self.check_length("num_frames", num_frames)
        except ConditionError as error:
            wrong.append(str(error))
        if width * height * num_frames > MAX_PIXELS:
            wrong.append(
                f"{width}x{height} with {num_frames} frames are {width * height * num_frames:,} pixels; at most "
                f"{MAX_PIXELS:,} are allowed"
            )
        if any(wrong):
            raise ConditionError("; ".join(filter(None, wrong)))

    def check_length(self, name: str, num_frames: int) -> None:
        """Check that a clip can have this number of frames.

        Raises:
            ConditionError: names the two nearest legal numbers.
        """
        if num_frames < 1 or (num_frames - 1) % self.temporal:
            below = max(0, num_frames - 1) // self.temporal * self.temporal + 1
            legal = f"{self.temporal}k + 1; the nearest are {below} and {below + self.temporal}"
            raise ConditionError(f"{name} {num_frames} is not {legal}")

    def _wrong_size(self, name: str, value: int) -> str:
        if value >= self.pixel_step and value % self.pixel_step == 0:
            return ""
        nearest = max(self.pixel_step, round(value / self.pixel_step) * self.pixel_step)
        return f"{name} {value} is not a multiple of {self.pixel_step}; the nearest is {nearest}"


@dataclass(frozen=True)
class JobDefaults:
    """Values of a generate job that neither the job nor its manifest sets; ingested clips get the same shape."""

    width: int
    height: int
    num_frames: int
    fps: float
    steps: int
    guidance: float
    noise_schedule: str
    negative_prompt: str = ""
    embedded_guidance: float | None = None  # of models that were distilled with guidance, and take the number

    def by_key(self, preset: str) -> dict[str, Any]:
        """Return the value of each manifest key. `window`, the frames seen at once, is the length of a clip."""
        return asdict(self) | {"window": self.num_frames, "preset": preset}


@dataclass(frozen=True)
class RecipeDefaults:
    """Values of a fine-tune that its manifest does not set."""

    density: DensityName
    lora_targets: tuple[str, ...]  # ends of the names of the layers that a LoRA adapts; * matches any text
    embedded_guidance: float | None = None  # which the model is given while it is trained


@dataclass(frozen=True)
class Preset:
    """Multipliers of a family's published examples, by task."""

    image_to_video: float
    keyframes: tuple[float, float]  # of the picture at latent frame 0, and of every other
    transition: tuple[float, float]  # of the first clip's latent frames, and of the second's
    extension: tuple[float, ...]  # of the given latent frames in order; the last stands for any further ones


@dataclass(frozen=True)
class Rule:
    """A tensor of the original layout, and the tensors of diffusers' layout that it joins along the first dimension."""

    original: str
    diffusers: tuple[str, ...]
    swapped: bool = False  # the two halves of the first dimension are in the other order
    # All parts but the last are square, with as many rows as the layer has inputs; by default all have equally many.
    squares: bool = False

    def rows_of(self, rows: int, inputs: int | None) -> list[int]:
        """Return the number of rows of each part of a tensor.

        Args:
            rows: of the tensor.
            inputs: of the layer; needed only if some parts are square.

        Raises:
            ValueError: the tensor cannot be split so.
        """
        count = len(self.diffusers)
        if self.squares and inputs is None:
            raise ValueError(f"the inputs of the layer are not known, so its {rows} rows cannot be split")
        first = inputs if self.squares and inputs is not None else rows // count
        last = rows - (count - 1) * first
        if last < 1 or not (self.squares or last == first):
            kinds = f"{count - 1} times {first} rows and a rest" if self.squares else f"{count} equal parts"
            raise ValueError(f"{rows} rows cannot be split into {kinds}")
        return [first] * (count - 1) + [last]


def affine(theirs: str, ours: str, swapped: bool = False) -> Iterator[Rule]:
    """Yield the rules of the weight and the bias of a module."""
    for kind in ("weight", "bias"):
        yield Rule(f"{theirs}.{kind}", (f"{ours}.{kind}",), swapped)


def count_modules(names: set[str], theirs: str, ours: str) -> int:
    """Return how many consecutive modules `names` has in either layout, from 0 on."""
    return next(i for i in itertools.count() if not {theirs.format(i), ours.format(i)} & names)


@dataclass(frozen=True)
class LayoutFile:
    """A file of the original layout: which part of a model it holds, and how its tensors map to diffusers' names.

    It may be split into shards, with an index named as the file with `.index.json`. `rules` takes the tensor names of a
    file in either layout, since they show the number of layers. `config` takes the shapes by diffusers' names, and what
    the file's metadata and the authors' config.json state; it returns the settings of diffusers' class.
    """

    name: str  # its path in the model's folder
    part: str
    prefix: str  # of the diffusers names that the file holds
    mark: str  # a tensor name that no file of another network has
    diffusers_mark: str  # the same in diffusers' names
    rules: Callable[[set[str]], Iterator[Rule]]
    config: Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]
    # Of a transformer: an original tensor name that each block of a kind has, with {} in place of its number, and one
    # of each module that only some models have.
    blocks: tuple[str, ...] = ()
    original_class: str = ""  # of the config.json that the authors keep beside the file, "" if they keep none
    original_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None  # its content, of diffusers' settings
    from_original: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None  # the other way
    named: str = ""  # a regex: a file or folder whose name has it holds this part, where several have the same mark
    spare: tuple[tuple[str, str], ...] = ()  # tensors that some tools write: name -> which one it equals, "" for none
    stem: str = "diffusion_pytorch_model"  # of the names of diffusers' files
    pickle: str = ""  # the name under which the authors publish the file as a pickle, which is not read
    prefixes: tuple[str, ...] = ()  # a tool may write one of these before every name
    # Parts of the original names, each with how another tool spells it; {} stands for a number.
    spelling: tuple[tuple[str, str], ...] = ()
    matrices: str = ""  # a regex: the tensors that are matrices, where a tool may have convolutions of one pixel

    def spell(self, name: str) -> str:
        """Return an original name as the other tool spells it."""
        for ours, theirs in self.spelling:
            name = _respell(name, ours, theirs)
        return name

    def unspell(self, name: str) -> str:
        """Return the original name for one as the other tool may spell it."""
        for ours, theirs in reversed(self.spelling):
            name = _respell(name, theirs, ours)
        return name


def _respell(name: str, before: str, after: str) -> str:
    if before.partition("{}")[0] not in name:  # five times as fast as the search
        return name
    return _pattern(before).sub(lambda match: after.format(*match.groups()), name)


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)"))


@dataclass(frozen=True)
class Layout:
    """The layout in which a family's authors publish their weights: files with names of their own."""

    name: str
    files: tuple[LayoutFile, ...]
    in_metadata: tuple[str, ...] = ()  # settings that the layout has no place for, kept in the files' metadata
    folders: Mapping[str, str] = field(default_factory=dict)  # part without weights -> its folder
    refused: Mapping[str, str] = field(default_factory=dict)  # regex of a tensor name -> why its model is not used
    safetensors_at: str = ""  # a repository that has as safetensors what the authors publish as pickles

    def files_of(self, part: str) -> list[LayoutFile]:
        """Return the files that hold a part of a model."""
        return [file for file in self.files if file.part == part]

    def places_of(self, part: str) -> list[str]:
        """Return the files or the folder of a part, by their paths in a model's folder."""
        folder = [self.folders[part]] if part in self.folders else []
        return folder + [file.name for file in self.files_of(part)]

    def pickle_advice(self, part: str, files: Collection[str]) -> str:
        """Return what to do about a part that `files` have only as a pickle, as a sentence; "" if they do not."""
        found = [file.pickle for file in self.files_of(part) if file.pickle in files]
        key = part if part == "vae" else "weights" if part.startswith("transformer") else "text_encoder"
        return (
            f"{found[0]} is a pickle, which can run code when it is read; {self.safetensors_at} has the same as "
            f'safetensors: add `{key}: "hf:{self.safetensors_at}"` to the model in the manifest'
            if found and found[0]
            else ""
        )


@dataclass(frozen=True)
class Family:
    """A family of base models."""

    name: str
    backbone: str  # "module:class" of its `pusa.backbones.base.Backbone`
    geometry: Geometry
    job: JobDefaults
    recipe: RecipeDefaults
    presets: Mapping[str, Preset]
    preset: str  # the default one for tasks that follow the published examples
    layout: Layout
    marks: Mapping[str, str]  # what `pusa weights inspect` calls weights -> a regex that only their tensor names match
    sizes: Mapping[str, int] = field(default_factory=dict)  # name of a published transformer's size -> parameters
    transformers: tuple[str, ...] = ("transformer",)
    experts: Mapping[str, str] = field(default_factory=dict)  # name -> transformer, from high to low levels
    boundary: float | None = None  # the level below which the second expert takes over, where the model states none
    latent_spaces: tuple[str, ...] = ("dit", "vae")  # that its transformers are trained in, or were published in
    vaes: tuple[str, ...] = ("vae",)
    latent_settings: Mapping[str, int] = field(default_factory=dict)  # that decide a VAE's latents, beside its weights
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    image_encoders: tuple[str, ...] = ()
    pipeline: str = ""  # the class of diffusers' own pipeline, "" if it has none
    vocabularies: tuple[str, ...] = field(default=("tokenizer.json", "spiece.model"))  # a tokenizer has one of these
    tiny: str = ""  # the built-in model of this family at tiny size, e.g. "builtin:tiny"
    tiny_recipe: str = ""  # "module:TinyRecipe", how the built-in tiny model is made; "" if there is none

    def expert_of(self, part: str) -> str | None:
        """Return the name of the expert that a transformer is; None for any other part."""
        return next((name for name, transformer in self.experts.items() if transformer == part), None)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Return the parts that turn prompts into features."""
        return (*self.text_encoders, *self.tokenizers)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Return the parts that precompute needs."""
        return (*self.vaes, *self.text_parts, *self.image_encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return all parts of a model, as diffusers names their folders."""
        return (*self.encoders, *self.transformers)
