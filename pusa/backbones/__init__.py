"""List the families of base models that Pusa can vectorize: name -> "module:Family".

To add one: a folder beside `mochi/` with the same file names, and one line here. The first is the default.
"""

from pusa.backbones.family import Family
from pusa.registry import find

BACKBONES = {
    "mochi": "pusa.backbones.mochi:FAMILY",
    "wan2.1": "pusa.backbones.wan:WAN_2_1",
    "wan2.2-a14b": "pusa.backbones.wan:WAN_2_2_A14B",
    "wan2.2-5b": "pusa.backbones.wan:WAN_2_2_5B",
}
DEFAULT_BACKBONE = next(iter(BACKBONES))
# What `pusa weights inspect` calls weights of families that are not supported yet, as `Family.marks`.
OTHER_MARKS = {
    "hunyuan_video": r"double_blocks\.|single_transformer_blocks\..*proj_mlp",
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
