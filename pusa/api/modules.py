"""Use the modules of a diffusers pipeline as a model: find their family, and sample with our classes of them."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Union

import torch
from diffusers import ModelMixin
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from pusa.backbones import all_families
from pusa.backbones.base import Backbone, find_backbone
from pusa.backbones.family import Family
from pusa.backbones.settings import check_settings
from pusa.errors import WeightsError
from pusa.manifest.network import ModelSpec
from pusa.system.strict import list_problems
from pusa.system.text import join_names, printable
from pusa.weights.load import is_unused, without_weights
from pusa.weights.model import Model
from pusa.weights.resolve import MODEL_INDEX, latent_space, require_one_space
from pusa.weights.source import PartFiles

log = logging.getLogger(__name__)


def classes_of(*parts: str) -> Any:
    """Return the type of parts in annotations: every family's class of them, and the library's that this extends.

    diffusers compares it with the classes of given components, in `from_pipe` and in warnings.
    """
    backbones = [find_backbone(family.name) for family in all_families()]
    own = [backbone.classes[part] for backbone in backbones for part in parts if part in backbone.classes]
    return Union[tuple(dict.fromkeys(known for cls in own for known in _known(cls)))]  # noqa: UP007  of a number of classes that only the families know


def find_family_of(transformers: Mapping[str, Any]) -> Family:
    """Return the family whose transformers these are, by their classes, their number and their latent channels.

    Args:
        transformers: the modules by part; ours, or diffusers' own.

    Raises:
        WeightsError: no family has such transformers.
    """
    for family in all_families():
        backbone = find_backbone(family.name)
        if set(family.transformers) == set(transformers) and all(
            _is_of(backbone, part, uncompiled(module)) and module.config.in_channels == family.geometry.channels
            for part, module in transformers.items()
        ):
            return family
    found = ", ".join(
        f"{part} a {type(uncompiled(module)).__name__} of {module.config.get('in_channels')} channels"
        if isinstance(uncompiled(module), ModelMixin)
        else f"{part} a {type(module).__name__}"
        for part, module in transformers.items()
    )
    known = "; ".join(
        f"{family.name}: {' and '.join(family.transformers)}, "
        f"{' or '.join(_names(find_backbone(family.name), family.transformers[0]))} of {family.geometry.channels} "
        f"channels"
        for family in all_families()
    )
    raise WeightsError(f"no family has these transformers: {found or 'none'}. Allowed are {known}")


def adopt(backbone: Backbone, part: str, module: Any) -> Any:
    """Return a part as an instance of the family's own class, with the weights of the one that is given.

    Ours is returned as it is. One of the class of diffusers or transformers that ours extends is built anew around the
    same weights, which are not copied; the one that was given stays usable.

    Raises:
        WeightsError: it is of another class or has other settings, has LoRAs, or was compiled before.
    """
    plain = uncompiled(module)
    if isinstance(plain, backbone.classes[part]):
        return module
    if not _is_of(backbone, part, plain):
        raise WeightsError(
            f"the {part} is a {type(plain).__name__}; a {backbone.family.name} has a "
            f"{' or '.join(_names(backbone, part))}"
        )
    if plain is not module:
        raise WeightsError(f"the {part} was compiled before; give it uncompiled, and compile the pipeline's own")
    values = dict(plain.config.to_dict() if isinstance(plain, PreTrainedModel) else plain.config)
    arguments = check_settings(backbone.settings[part], values, f"the configuration of the {part}").arguments()
    own = without_weights(backbone.classes[part], arguments)
    weights = {name: weight for name, weight in plain.state_dict().items() if not is_unused(own, name)}
    if differing := sorted(set(weights) ^ set(own.state_dict())):
        raise WeightsError(
            f"the {part} has other weights than a plain {type(plain).__name__}: {join_names(differing)}; give it "
            "without LoRAs and not quantised, and load LoRAs into the pipeline"
        )
    own.load_state_dict(weights, assign=True)
    backbone.finish(part, own)
    if isinstance(own, ModelMixin):
        own.register_to_config(_name_or_path=plain.config.get("_name_or_path"))
    return own.eval().requires_grad_(False)


def uncompiled(module: Any) -> Any:
    """Return the module that torch.compile wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def diffusers_name(module: Any) -> tuple[str, str] | None:
    """Return the library and the class by which an index names a part that every reader can load; None: its own."""
    _, *bases = _known(type(uncompiled(module)))
    return (bases[0].__module__.split(".")[0], bases[0].__name__) if bases else None


def _known(own: type) -> list[type]:
    """Return a class of a part and, if it is one of ours, the class of diffusers or transformers that it extends."""
    bases = [base for base in own.__bases__ if issubclass(base, ModelMixin | PreTrainedModel)]
    return [own, *(base for base in bases if own.__module__.startswith("pusa.") and _is_librarys(base))]


def _is_librarys(cls: type) -> bool:
    return cls.__module__.startswith(("diffusers.", "transformers.")) and cls not in (ModelMixin, PreTrainedModel)


def _is_of(backbone: Backbone, part: str, module: Any) -> bool:
    own = backbone.classes[part]
    return isinstance(module, own) or type(module) in _known(own)


def _names(backbone: Backbone, part: str) -> list[str]:
    return [cls.__name__ for cls in _known(backbone.classes[part])]


def find_space(family: Family, transformers: Mapping[str, Any], stated: str | None) -> str:
    """Return the latent space of transformers: what the files that they were loaded from record, else what is stated.

    Raises:
        WeightsError: records differ from each other, from `stated`, or from the family or expert that a part is of.
    """
    spec = {"backbone": family.name, "weights": MODEL_INDEX}
    try:
        manifest = ModelSpec.model_validate({**spec, "latent_space": stated})
    except ValidationError as error:
        raise WeightsError("; ".join(list_problems(error, ModelSpec))) from error
    spaces = {}
    for part, module in transformers.items():
        origin = Path(str(module.config.get("_name_or_path") or ""))
        places = [place for place in (origin, origin / part) if any(place.glob("*.safetensors"))] if origin.name else []
        files = [PartFiles(part, (place,)) for place in places[:1]]
        if not files and origin.name and not stated and len(family.latent_spaces) > 1:
            log.warning(
                "the %s is from %s, whose files were not looked at: its latent space is taken as %s; if it is another, "
                "give latent_space=",
                part, printable(origin), family.latent_spaces[0],
            )  # fmt: skip
        spaces[part] = latent_space(manifest, files[0]) if files else stated or family.latent_spaces[0]
    require_one_space(spaces)
    return next(iter(spaces.values()))


class _InTurn(Mapping[str, Any]):
    """Parts by name, each brought to the device when it is looked up."""

    def __init__(self, ready: Mapping[str, Callable[[], Any]]) -> None:
        self._ready = ready

    def __getitem__(self, name: str) -> Any:
        return self._ready[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._ready)

    def __len__(self) -> int:
        return len(self._ready)


class ModulesModel(Model):
    """The parts of a pipeline as the `Model` that sampling and decoding use. It loads and moves nothing.

    Args:
        family: what the parts belong to.
        parts: the modules and tokenizers by name.
        device: where the pipeline computes.
        space_name: the latent space of the transformers.
        boundary: the level from which on the first of two transformers denoises.
    """

    def __init__(
        self,
        family: Family,
        parts: Mapping[str, Any],
        device: torch.device,
        space_name: str,
        boundary: float | None,
    ) -> None:
        super().__init__(ModelSpec(backbone=family.name, weights="the modules of a pipeline"), device)
        self._parts = parts
        self.dtype = parts[family.transformers[0]].dtype
        self.space_name, self.boundary = space_name, boundary

    def part(self, name: str) -> Any:
        """Return a part.

        Raises:
            WeightsError: the pipeline was made without it.
        """
        if self._parts.get(name) is None:
            raise WeightsError(f"the pipeline has no {name}, which this call needs; give it to `from_pretrained`")
        return self._parts[name]

    @property
    def text_parts(self) -> Mapping[str, Any]:
        """Return the tokenizers and text encoders by name; `enable_model_cpu_offload` moves each as it is used."""
        family = self.backbone.family
        return _InTurn(
            {
                **{name: partial(self.part, name) for name in family.tokenizers},
                **{name: partial(self._on_device, name) for name in family.text_encoders},
            }
        )

    def _on_device(self, part: str) -> nn.Module:
        """Return a module, on its device also where `enable_model_cpu_offload` moves it there before its forward.

        The VAE's own methods are no forward, and inputs are made on the device that a module is on.
        """
        module = self.part(part)
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(module)
        assert isinstance(module, nn.Module), printable(type(module))
        return module
