"""State the ranges of Wan's settings: those of diffusers' classes and of UMT5. Channels and sizes are each family's."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StrictBool, model_validator

from pusa.backbones.family import Geometry
from pusa.backbones.settings import Count, Deviation, Settings, Statistic, Steps, T5Settings, Width
from pusa.backbones.wan import WAN_2_1, WAN_2_2_5B

TransformerName = Annotated[str, Field(pattern="^(FSDP)?(Pusa)?WanTransformer3DModel$")]
VaeName = Annotated[str, Field(pattern="^(Pusa)?AutoencoderKLWan$")]
Multiple = Annotated[int, Field(ge=1, le=64)]
Ratio = Annotated[float, Field(ge=0, le=1)]
TEXT_TO_VIDEO = "these are weights for image-to-video; Pusa needs the text-to-video weights"


class TransformerSettings(Settings):
    """Arguments of diffusers' WanTransformer3DModel."""

    geometry: ClassVar[Geometry] = WAN_2_1.geometry

    kind: TransformerName | None = Field(None, alias="_class_name")
    patch_size: tuple[Multiple, Multiple, Multiple] = (1, 2, 2)
    num_attention_heads: Count
    # Sines and cosines of the rope for each of three axes: height and width get 2 * (K // 6), time the rest.
    attention_head_dim: Annotated[int, Field(ge=6, le=1024, multiple_of=2)]
    in_channels: Annotated[int, Field(ge=1, le=1024)]
    out_channels: Annotated[int, Field(ge=1, le=1024)] | None = None
    text_dim: Width
    freq_dim: Annotated[Width, Field(multiple_of=2)]  # sines and cosines
    ffn_dim: Width
    num_layers: Count
    cross_attn_norm: StrictBool = True
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    image_dim: Width | None = None
    added_kv_proj_dim: Width | None = None
    rope_max_seq_len: Steps = 1024
    pos_embed_seq_len: Steps | None = None

    @model_validator(mode="after")
    def _check_inputs(self) -> Self:
        """Check that the inputs are noisy latents of the family's VAE, and a text."""
        channels = self.geometry.channels
        for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} is {value}; {TEXT_TO_VIDEO}")
        for name, value in (("in_channels", self.in_channels), ("out_channels", self.out_channels or channels)):
            if value != channels:
                hint = f"; {TEXT_TO_VIDEO}" if name == "in_channels" and self.out_channels == channels else ""
                raise ValueError(f"{name} is {value}; expected {channels}, as the VAE's latents have{hint}")
        if self.patch_size != (patch := (1, self.geometry.patch, self.geometry.patch)):
            raise ValueError(f"patch_size is {self.patch_size}; expected {patch}")
        return self


class VaeSettings(Settings):
    """Arguments of diffusers' AutoencoderKLWan."""

    geometry: ClassVar[Geometry] = WAN_2_1.geometry

    kind: VaeName | None = Field(None, alias="_class_name")
    base_dim: Width = 96
    decoder_base_dim: Width | None = None
    z_dim: Count = 16
    dim_mult: Annotated[tuple[Multiple, ...], Field(min_length=2, max_length=8)] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, Field(ge=0, le=64)] = 2
    attn_scales: Annotated[tuple[float, ...], Field(max_length=0)] = ()  # diffusers' class fails with any
    temperal_downsample: Annotated[tuple[StrictBool, ...], Field(max_length=7)] = (False, True, True)
    dropout: Ratio = 0.0
    latents_mean: tuple[Statistic, ...] = ()  # where they are missing, the class has those of Wan 2.1
    latents_std: tuple[Deviation, ...] = ()
    is_residual: StrictBool = False
    in_channels: Count = 3
    out_channels: Count = 3
    patch_size: Annotated[int, Field(ge=1, le=16)] | None = None
    scale_factor_temporal: Count = 4
    scale_factor_spatial: Count = 8

    @model_validator(mode="after")
    def _check_geometry(self) -> Self:
        """Check that the stages compress as the family's geometry says, and that each channel has its statistics."""
        geometry, patch = self.geometry, self.patch_size or 1
        halvings = len(self.dim_mult) - 1
        found = {
            "z_dim": (self.z_dim, geometry.channels),
            "the number of values of temperal_downsample": (len(self.temperal_downsample), halvings),
            "the compression in space, by dim_mult and patch_size,": (patch << halvings, geometry.spatial),
            "the compression in time, by temperal_downsample,": (1 << sum(self.temperal_downsample), geometry.temporal),
            "scale_factor_spatial": (self.scale_factor_spatial, geometry.spatial),
            "scale_factor_temporal": (self.scale_factor_temporal, geometry.temporal),
            "in_channels": (self.in_channels, 3 * patch**2),
            "out_channels": (self.out_channels, 3 * patch**2),
        }
        for name in ("latents_mean", "latents_std"):
            count = len(getattr(self, name)) if name in self.model_fields_set else WAN_2_1.geometry.channels
            found[f"the number of values of {name}"] = (count, geometry.channels)
        for name, (value, expected) in found.items():
            if value != expected:
                raise ValueError(f"{name} is {value}; expected {expected}")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the settings that were given, as arguments of the class, which needs lists."""
        given = super().arguments()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


class TextEncoderSettings(T5Settings):
    """Arguments of transformers' UMT5Config. It ties the input embeddings, whatever `tie_word_embeddings` says."""

    kind: Literal["umt5", None] = Field(None, alias="model_type")
    feed_forward_proj: Literal["relu", "gelu", "gated-relu", "gated-gelu", "gated-silu"] = "gated-gelu"


class _TransformerSettings5B(TransformerSettings):
    geometry: ClassVar[Geometry] = WAN_2_2_5B.geometry


class _VaeSettings5B(VaeSettings):
    geometry: ClassVar[Geometry] = WAN_2_2_5B.geometry


SETTINGS: Mapping[str, type[Settings]] = {
    "transformer": TransformerSettings,
    "transformer_2": TransformerSettings,
    "vae": VaeSettings,
    "text_encoder": TextEncoderSettings,
}
SETTINGS_5B: Mapping[str, type[Settings]] = {**SETTINGS, "transformer": _TransformerSettings5B, "vae": _VaeSettings5B}
