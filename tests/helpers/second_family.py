"""A second family of base models, without networks: for what a manifest takes from the family that it names."""

from dataclasses import replace

from pusa.backbones.family import Geometry, JobDefaults, Preset, RecipeDefaults
from pusa.backbones.mochi import FAMILY as FIRST

FAMILY = replace(
    FIRST,
    name="second",
    geometry=Geometry(spatial=8, temporal=4, patch=2, channels=16),
    job=JobDefaults(width=832, height=496, num_frames=81, fps=16, steps=30, guidance=5, noise_schedule="shifted(8)"),
    recipe=RecipeDefaults(density="shifted", lora_targets=("q", "v")),
    presets={"wan": Preset(0.25, (0.2, 0.5), (0.3, 0.8), (0.0, 0.3))},
    preset="wan",
)
