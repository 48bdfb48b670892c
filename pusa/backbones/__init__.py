"""List the families of base models that Pusa can vectorize: name -> "module:Family".

To add one: a folder beside `mochi/` with the same file names, and one line here. The first is the default.
"""

from collections.abc import Collection

from pusa.backbones.family import Family, Layout
from pusa.registry import find

BACKBONES = {
    "mochi": "pusa.backbones.mochi:FAMILY",
    "wan2.1": "pusa.backbones.wan:WAN_2_1",
    "wan2.2-a14b": "pusa.backbones.wan:WAN_2_2_A14B",
    "wan2.2-5b": "pusa.backbones.wan:WAN_2_2_5B",
    "hunyuan_video": "pusa.backbones.hunyuan_video:FAMILY",
}
DEFAULT_BACKBONE = next(iter(BACKBONES))
# What `pusa weights inspect` calls weights of families that are not supported yet, as `Family.marks`.
OTHER_MARKS = {
    # Version 1.0 has 20 double-stream blocks, 1.5 has 54; only in 1.5 do the authors store q, k and v separately.
    "hunyuan_video-1.5": r"cond_type_embed|double_blocks[._](\d+[._](img|txt)_attn_[qkv]\.|[2-5]\d[._])",
}


def find_family(name: str = DEFAULT_BACKBONE) -> Family:
    """Return a family by its name.

    Raises:
        ManifestError: no family has this name.
    """
    family: Family = find(BACKBONES, name, "backbone")
    return family


def all_families() -> list[Family]:
    """Return every registered family, in the order of the table."""
    return [find_family(name) for name in BACKBONES]


def all_parts() -> tuple[str, ...]:
    """Return the parts that any family has, each once."""
    return tuple(dict.fromkeys(part for family in all_families() for part in family.parts))


def all_transformers() -> tuple[str, ...]:
    """Return the transformers that any family has, by their names as parts, each once."""
    return tuple(dict.fromkeys(part for family in all_families() for part in family.transformers))


def all_layouts() -> list[Layout]:
    """Return the original layout of every family, each once."""
    layouts: list[Layout] = []
    for family in all_families():
        if not any(family.layout is layout for layout in layouts):
            layouts.append(family.layout)
    return layouts


def misfit(family: Family, part: str, folders: Collection[str]) -> str:
    """Return why a model with these folders is not of a family whose transformer is asked for; "" if it may be."""
    if part not in family.transformers:
        return ""
    for other in all_families():
        extra = [name for name in other.transformers if name not in family.transformers and name in folders]
        if extra:
            return (
                f"it has {extra[0]}, as {other.name} has and {family.name} has not; check `backbone:` in the manifest"
            )
    return ""
