"""Write the model card of an export, README.md: the recipe, the data, the base, the licence, and how to use it.

Its front matter is that of the Hub. Whatever a record or a file name says is shown literally.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pusa.backbones import find_family
from pusa.backbones.family import Family
from pusa.errors import ConditionError
from pusa.system.files import atomic, write_text
from pusa.system.text import LONGEST_NAME, markdown, printable
from pusa.weights.hub import HUB_PREFIX

log = logging.getLogger(__name__)
CARD, SAMPLES, VALIDATION = "README.md", "samples.jpg", "validation"
SIGNATURE = re.compile(r"\n<!-- pusa weights export ([0-9a-f]{16}) -->\n\Z")  # of a card that nobody has edited
# Identifiers of the Hub for licences that weights often have; any other licence is `other`, with its name.
SHAPE = re.compile(r"[0-9]{1,5}(x[0-9]{1,5}){2}")  # WIDTHxHEIGHTxFRAMES
# Words, numbers and sentences in which markdown sees no mark.
PLAIN = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9']*(?:(?:(?:,|(?<=[a-z])[.;:])? |-|(?<=\d)\.(?=\d))[A-Za-z0-9']+)*(?:(?<=[a-z])\.)?",
    re.ASCII,
)
LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "bigscience-openrail-m", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-4.0", "cc0-1.0",
    "creativeml-openrail-m", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense", "wtfpl",
}  # fmt: skip
RECIPE = (
    "train", "levels", "density", "level_range", "weighting", "batch_size", "learning_rate", "warmup_steps",
    "lr_schedule", "weight_decay", "max_grad_norm", "caption_dropout", "embedded_guidance", "ema_decay", "precision",
    "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a card is about.

    Attributes:
        record: that of the fine-tune.
        to: the layout of the export: "pipeline", "diffusers", or one of a LoRA alone.
        backbone: the name of the family.
        licence: the user's words for the licence, or an identifier of the Hub; None where none was stated.
        sheet: a picture of samples.
        base: the name of the base's weights as a manifest has it; default: the recorded one, None where there is none.
    """

    record: Mapping[str, Any]
    to: str
    backbone: str
    licence: str | None = None
    sheet: Path | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        recorded = _mapping(self.record.get("base")).get("weights")
        if self.base is None and isinstance(recorded, str):
            object.__setattr__(self, "base", recorded)

    @property
    def is_lora(self) -> bool:
        """Return whether the export is a LoRA alone."""
        return self.to not in ("pipeline", "diffusers")


def find_sheet(checkpoint: Path) -> Path | None:
    """Return the newest validation sheet of the run that a checkpoint is of, at most of its step; None if none."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not checkpoint.name.isdecimal():
        return None
    sheets = [path for path in (run / VALIDATION).glob("[0-9]*.jpg") if path.stem.isdecimal()]
    return max((path for path in sheets if int(path.stem) <= int(checkpoint.name)), default=None)


def write_card(folder: Path, card: Card) -> list[Path]:
    """Write README.md and samples.jpg into a folder, each atomically; return the files.

    A card that somebody has written or edited stays, with a warning, and the samples as well.
    """
    path = folder / CARD
    if path.exists() and not is_unedited(path):
        log.warning("%s was written by somebody else, or edited: it stays as it is", path)
        return []
    samples = folder / SAMPLES
    if card.sheet:
        with atomic(samples) as partial:
            shutil.copyfile(card.sheet, partial)
    else:
        samples.unlink(missing_ok=True)
    text = "\n".join(_lines(card)) + "\n"
    write_text(path, f"{text}\n<!-- pusa weights export {_signature(text)} -->\n")
    return [path, *([samples] if card.sheet else [])]


def is_unedited(path: Path) -> bool:
    """Return whether a card is as `write_card` wrote it."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return False
    found = SIGNATURE.search(text)
    return found is not None and found[1] == _signature(text[: found.start()])


def _signature(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lines(card: Card) -> Iterator[str]:
    record, family = card.record, find_family(card.backbone)
    recipe = _mapping(record.get("recipe"))
    yield f"---\n{yaml.safe_dump(_front_matter(card), sort_keys=True, allow_unicode=False).strip()}\n---"
    what = "A LoRA" if card.is_lora else "A fine-tune"
    yield f"# {what} of {_base_name(card)}\n"
    yield (
        f"A model of the family {_literal(family.name)} with one noise level per latent frame: beside text to video it "
        "makes videos from given pictures and clips, at any place and with any noise.\n"
    )
    if card.sheet:
        yield (
            f"![Samples]({SAMPLES})\n\nClips of the data set, and what the model makes of their captions and of "
            "their first or last latent frames.\n"
        )
    yield from _use(card)
    yield "## Training\n"
    yield from _table(_facts(record, recipe), "fact")
    yield from _table(_recipe(recipe), "setting") if recipe else ("The recipe is not recorded.\n",)
    for change in record.get("overrides") or ():
        yield f"From step {_literal(_mapping(change).get('step'))} on: {_literal(_as_json(change), longest=1000)}\n"
    yield "## Licence\n"
    yield (
        f"{_literal(card.licence, longest=2000)}\n"
        if (card.licence or "").strip()
        else "Whoever exported these weights stated no licence. The terms of the base apply, and perhaps those of the "
        "training data; ask the author before you use them.\n"
    )


def _front_matter(card: Card) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["pusa", "vectorized-timestep", "video", *(["lora"] if card.is_lora else [])],
    }
    if hub := _hub_base(card.base):
        facts |= {"base_model": hub, "base_model_relation": "adapter" if card.is_lora else "finetune"}
    licence = (card.licence or "").strip()
    if not licence:
        return {**facts, "license": "unknown"}
    if licence.lower() in LICENCES:
        return {**facts, "license": licence.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", printable(licence, 60).lower()).strip("-.")
    return {**facts, "license": "other", "license_name": name or "stated-in-the-card"}


def _use(card: Card) -> Iterator[str]:
    """Yield how the export is used: in a manifest, as a pipeline, and with diffusers' own classes."""
    base, here = _usable(card.base), "FOLDER"
    model: dict[str, Any] = {"backbone": card.backbone, "weights": base if card.to != "pipeline" else here}
    family = find_family(card.backbone)
    expert = card.record.get("expert")
    expert = expert if isinstance(expert, str) and expert in family.experts else None
    if card.is_lora:
        model |= {"loras": [{"weights": here, "expert": expert}]} if expert else {"lora": here}
    elif card.to == "diffusers":
        model["checkpoint"] = {expert: here} if expert else here
    part = family.experts[expert] if expert else family.transformers[0]
    python = ["from diffusers import AutoModel"] if card.to == "diffusers" else []
    python += ["from diffusers.utils import load_image", "from pusa import Condition, PusaPipeline", ""]
    python += [*_load(card, base, part), 'first = Condition(load_image("picture.png"), position=0, multiplier=0.2)']
    size = "".join(f"{key}={value}, " for key, value in _size(card.record, family).items())
    python += [f'made = pipe("a prompt", conditions=[first], {size}generator=0, output_type="pil")']
    python += ["video = made.frames[0]  # pictures"]
    alone = _load_with_diffusers(card, family, part)
    words = f"`{here}` is this folder, downloaded."
    if any('"BASE"' in line for line in (json.dumps(model), *python, *alone)):
        words += " `BASE` is the folder of the base model in diffusers' layout"
        words += f" ({_literal(base)}: in `builtin` of the package `pusa`)." if base != "BASE" else "."
    yield f"## Use\n\n{words}\n"
    yield f"In a manifest of `pusa generate`:\n\n```yaml\nmodel: {json.dumps(model)}\n```\n"
    yield "In Python, with Pusa:\n\n```python\n" + "\n".join(python) + "\n```\n"
    if alone:
        yield "With diffusers alone, whose pipelines give all frames one level and so make text to video:\n"
        yield "```python\n" + "\n".join(alone) + "\n```\n"


def _size(record: Mapping[str, Any], family: Family) -> dict[str, int]:
    """Return width, height and frames of the largest clips that were trained on, as a call has them; {} if unknown."""
    buckets = _mapping(_mapping(record.get("data")).get("buckets"))
    sizes = [tuple(map(int, shape.split("x"))) for shape in map(str, buckets) if SHAPE.fullmatch(shape)]
    for size in sorted(sizes, key=lambda size: (math.prod(size), size), reverse=True):
        try:
            family.geometry.check(*size)
        except ConditionError:
            continue
        return dict(zip(("width", "height", "num_frames"), size, strict=True))
    return {}


def _load(card: Card, base: str, part: str) -> list[str]:
    folder = _quoted(base)
    if card.to == "pipeline":
        return ['pipe = PusaPipeline.from_pretrained("FOLDER")']
    if card.is_lora:
        return [f"pipe = PusaPipeline.from_pretrained({folder})", 'pipe.load_lora_weights("FOLDER")']
    return [
        f'tuned = AutoModel.from_pretrained("FOLDER/{part}")',
        f"pipe = PusaPipeline.from_pretrained({folder}, {part}=tuned)",
    ]


def _load_with_diffusers(card: Card, family: Family, part: str) -> list[str]:
    """Return the code that loads the export without Pusa; none for what diffusers may not know."""
    if card.to == "pipeline":
        own = family.pipeline
        return [f"from diffusers import {own}", "", f'pipe = {own}.from_pretrained("FOLDER")'] if own else []
    base = _quoted(_hub_base(card.base) or "BASE")  # which a built-in model is not, for diffusers
    if card.to == "lora":
        place = "" if part == family.transformers[0] else f", load_into_{part}=True"
        load = f"pipe = DiffusionPipeline.from_pretrained({base})"
        return ["from diffusers import DiffusionPipeline", "", load, f'pipe.load_lora_weights("FOLDER"{place})']
    if card.is_lora:
        return []
    load = f"pipe = DiffusionPipeline.from_pretrained({base}, {part}=tuned)"
    tuned = f'tuned = AutoModel.from_pretrained("FOLDER/{part}")'
    return ["from diffusers import AutoModel, DiffusionPipeline", "", tuned, load]


def _facts(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a training, by its name in plain words."""
    data, base = _mapping(record.get("data")), _mapping(record.get("base"))
    buckets = _mapping(data.get("buckets"))
    shown = [f"{shape}: {count}" for shape, count in list(buckets.items())[:20]]
    return {
        "steps": record.get("step"),
        "skipped steps": record.get("skipped"),
        "clips": data.get("clips"),
        "clips by width, height and frames": ", ".join(map(str, shown)) + (", ..." if len(buckets) > 20 else ""),
        "table of latents": recipe.get("latents"),
        "base": _as_json({key: _public(value) for key, value in base.items() if value}) if base else None,
        "fingerprint of the base": recipe.get("base"),
        "latent space": record.get("latent_space"),
        "expert": record.get("expert"),
        "strength of the merged LoRA": record.get("strength"),
        "versions": ", ".join(f"{name} {number}" for name, number in _mapping(record.get("versions")).items()),
        "exported with": f"pusa {version('pusa')}",
    }


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    train = _mapping(recipe.get("train"))
    method = {f"train: {key}": value for key, value in train.items() if value not in (None, [], ())}
    return method | {key: recipe[key] for key in RECIPE if key in recipe and key != "train"}


def _table(facts: Mapping[str, Any], heading: str) -> Iterator[str]:
    rows = [(key, value) for key, value in facts.items() if value not in (None, "")]
    yield f"| {heading} | |\n|---|---|"
    for key, value in rows:
        yield f"| {_literal(key)} | {_literal(value if isinstance(value, str) else json.dumps(value), longest=1000)} |"
    yield ""


def _literal(value: Any, longest: int = LONGEST_NAME) -> str:
    """Return markdown that shows a text literally: as it is where it has no mark, else as code, else with escapes."""
    text = printable(value, longest).strip()
    if PLAIN.fullmatch(text):
        return text
    return f"`{text}`" if text and not set(text) & set("`|<") else markdown(value, longest)


def _base_name(card: Card) -> str:
    if hub := _hub_base(card.base):
        return f"[{_literal(hub)}](https://huggingface.co/{hub})"
    return _literal(_public(card.base)) if card.base else "a base that is not recorded"


def _public(value: Any) -> Any:
    """Return a value of the base's record without the folders of this machine: of a path, its name."""
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _usable(base: str | None) -> str:
    """Return a base's name if it means the same on other machines, else a word to put one's own in place of."""
    return base if base and (_hub_base(base) or re.fullmatch(r"builtin:[\w-]+", base, re.ASCII)) else "BASE"


def _quoted(base: str) -> str:
    """Return a base's name as `from_pretrained` has it, in Python."""
    return json.dumps(_hub_base(base) or printable(base))


def _hub_base(base: str | None) -> str | None:
    """Return "ORG/NAME" of a base on the hub; None for any other."""
    match = re.fullmatch(rf"{HUB_PREFIX}([\w-][\w.-]*/[\w-][\w.-]*)(@[^:]*)?(:.*)?", base or "", re.ASCII)
    return match[1] if match else None


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return a value of a record if it is a mapping; records may come from strangers."""
    return value if isinstance(value, Mapping) else {}
