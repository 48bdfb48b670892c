"""Use Pusa from Python: `pusa.load` makes videos with a model that stays loaded, `pusa.run` runs a manifest's stage.

A model makes one video for each call. A call is a job of `pusa generate`: the same keys, the same checks, the same
bytes. The tiny model needs a few seconds:

>>> import numpy as np
>>> import pusa
>>> model = pusa.load("builtin:tiny-pusa", defaults={"width": 64, "height": 64, "num_frames": 31, "guidance": 1.5})
>>> video = model.generate(prompt="a red circle moves left on a dark background", steps=4, seed=7)
>>> video.frames.shape, video.frames.dtype, video.latents.shape
((31, 64, 64, 3), dtype('uint8'), torch.Size([12, 6, 8, 8]))

A picture is a file, a picture of Pillow or an array; a clip is a file, an array or another video:

>>> picture = np.full((64, 64, 3), (30, 30, 40), np.uint8)
>>> picture[20:40, 20:40] = 40, 160, 60
>>> moved = model.generate("image_to_video", image=picture, multiplier=0.2, steps=4)
>>> longer = model.generate("extension", video=moved, num_frames=31, steps=4)

A wrong key or value is refused before anything is computed:

>>> model.generate("image_to_video", image=picture, multiplyer=0.2)
Traceback (most recent call last):
pusa.errors.ManifestError: image_to_video.multiplyer: unknown key; did you mean 'multiplier'?

What is made again is not computed again, since the run's folder has it:

>>> again = model.generate("image_to_video", image=picture, multiplier=0.2, steps=4)
>>> again.path == moved.path, again.sidecar["key"] == moved.sidecar["key"]
(True, True)

Videos stay in the run's folder: a temporary one here, which is removed with the model and its last video. So
`pusa.load(..., run_dir="runs/tries")` keeps all of them, and `video.save("ball.gif")` one. In a notebook, a video shows
itself.
"""
