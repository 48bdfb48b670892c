"""Map the original names of Wan's files to diffusers' names, in both directions."""

from pusa.backbones.family import Layout

LAYOUT = Layout(name="wan", files=())
