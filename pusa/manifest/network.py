"""Define the `model:` of a manifest: a family, its weights, fine-tunes and LoRAs. No torch here."""

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from pusa.backbones import BACKBONES, DEFAULT_BACKBONE, find_family
from pusa.system.strict import ResolvedName, Strict


def _check_backbone(name: str) -> str:
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; allowed are {', '.join(BACKBONES)}")
    return name


BackboneName = Annotated[str, AfterValidator(_check_backbone)]
LatentSpaceName = Literal["dit", "vae"]
ExpertName = Literal["high", "low"]  # of a family with two transformers, by the levels that they denoise


class LoraSpec(Strict):
    """A LoRA to add to a transformer's weights: W + strength * alpha / rank * B A."""

    weights: ResolvedName = Field(description='a checkpoint of `pusa finetune`, a folder, a file, "hf:ORG/NAME:FILE"')
    strength: float = Field(
        1.0, ge=-100, le=100, description="the addition is multiplied by it; alpha is the rank where none is recorded"
    )
    expert: ExpertName | None = Field(None, description="the transformer, of a family that has two: high or low")


class ExpertCheckpoints(Strict):
    """Fine-tuned transformers of a family that has two. One that is not named is the weights' own."""

    high: ResolvedName | None = Field(None, description="for levels from the boundary up, a name as for checkpoint")
    low: ResolvedName | None = Field(None, description="for levels below the boundary, a name as for checkpoint")

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not (self.high or self.low):
            raise ValueError("names no checkpoint; expected high, low or both")
        return self


def _checkpoint_form(value: Any) -> str:
    return "by-expert" if isinstance(value, dict | ExpertCheckpoints) else "one-name"


# The tags have a "-" so that `format_place` leaves them out of the messages.
Checkpoint = Annotated[
    Annotated[ResolvedName, Tag("one-name")] | Annotated[ExpertCheckpoints, Tag("by-expert")],
    Discriminator(_checkpoint_form),
]


class ModelSpec(Strict):
    """Choose a network and its weights."""

    backbone: BackboneName = Field(DEFAULT_BACKBONE, description="a name of `pusa list backbones`")
    weights: ResolvedName = Field(description='"builtin:NAME", "hf:ORG/NAME[@revision]", or a folder')
    checkpoint: Checkpoint | None = Field(
        None,
        description='a fine-tuned transformer instead of the weights\' own: a folder, a file, "hf:ORG/NAME:FILE"; '
        "of a family with two transformers a mapping {high: ..., low: ...}",
    )
    lora: ResolvedName | None = Field(
        None,
        description='a LoRA for the transformer: a checkpoint of `pusa finetune`, a folder, a file, "hf:ORG/NAME:FILE"',
    )
    loras: tuple[LoraSpec, ...] = Field((), max_length=16, description="several LoRAs, instead of lora; all are summed")
    text_encoder: ResolvedName | None = Field(
        None, description="a model to take the text encoder from, where weights has none"
    )
    vae: ResolvedName | None = Field(
        None, description='a model to take the VAE from, where weights has none; or its file, "hf:ORG/NAME:FILE"'
    )
    latent_space: LatentSpaceName | None = Field(
        None, description='latent space of the transformer, where it records none; the published V0.5: "vae"'
    )
    vae_dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="dtype in which the VAE computes; default: bfloat16 on a GPU, else float32, as all parts"
    )
    offload: bool = Field(False, description="keep only the part in use on the device, and the others in main memory")

    @property
    def adapters(self) -> tuple[LoraSpec, ...]:
        """Return all LoRAs, that of the short form `lora` too."""
        return (*((LoraSpec(weights=self.lora),) if self.lora else ()), *self.loras)

    def checkpoint_of(self, part: str) -> str | None:
        """Return the fine-tune that is named for a part; None for what is no transformer, or is the weights' own."""
        family = find_family(self.backbone)
        if not isinstance(self.checkpoint, ExpertCheckpoints):
            return self.checkpoint if part in family.transformers else None
        expert = family.expert_of(part)
        return getattr(self.checkpoint, expert) if expert else None

    def with_checkpoint(self, part: str, name: str) -> "ModelSpec":
        """Return the same model with a fine-tune for one of its transformers."""
        expert = find_family(self.backbone).expert_of(part)
        if expert is None:
            return self.model_copy(update={"checkpoint": name})
        others = (
            self.checkpoint if isinstance(self.checkpoint, ExpertCheckpoints) else ExpertCheckpoints.model_construct()
        )
        return self.model_copy(update={"checkpoint": others.model_copy(update={expert: name})})

    @model_validator(mode="after")
    def _check_checkpoint(self) -> Self:
        experts = find_family(self.backbone).experts
        if experts and isinstance(self.checkpoint, str):
            raise ValueError(
                f"checkpoint {self.checkpoint!r} does not say which transformer it is, and {self.backbone} has two; "
                f"expected {{high: {self.checkpoint}}} or {{low: {self.checkpoint}}}"
            )
        if not experts and isinstance(self.checkpoint, ExpertCheckpoints):
            raise ValueError(
                f"checkpoint is a mapping by expert, and {self.backbone} has one transformer; expected one name"
            )
        return self

    @model_validator(mode="after")
    def _check_latent_space(self) -> Self:
        if self.latent_space and self.latent_space not in (allowed := find_family(self.backbone).latent_spaces):
            raise ValueError(
                f"latent_space is {self.latent_space!r}; {self.backbone} has {' or '.join(map(repr, allowed))} alone"
            )
        return self

    @model_validator(mode="after")
    def _check_loras(self) -> Self:
        if self.lora and self.loras:
            raise ValueError("lora and loras are both set; name all of them in loras")
        experts = find_family(self.backbone).experts
        for lora in self.adapters:
            if bool(lora.expert) != bool(experts):
                found = f"expert {lora.expert!r}" if lora.expert else "no expert"
                names = " or ".join(experts)
                allowed = f"expert: {names}, in `loras:`" if names else "none, since this model has one transformer"
                raise ValueError(f"LoRA {lora.weights!r} has {found}; {self.backbone} needs {allowed}")
        counts = Counter((lora.weights, lora.expert) for lora in self.adapters)
        if twice := [weights for (weights, _), count in counts.items() if count > 1]:
            raise ValueError(
                f"LoRA {twice[0]!r} is named twice for one transformer; name it once, with the sum of both"
            )
        return self
