"""Map the original names of HunyuanVideo's files to diffusers' names, in both directions."""

from pusa.backbones.family import Layout

LAYOUT = Layout(name="hunyuan_video", files=())
