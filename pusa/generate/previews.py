"""Show what a job becomes while it is sampled: its latents through a linear map to colours, without decoding.

The map is fitted once for a VAE, from pictures that are drawn here and what the VAE encodes them to. It is the same for
both latent spaces, since both leave sampling by z * std + mean.

Shapes: z_CFhw latents as sampling gives them; map_C1c from C channels and a one to red, green and blue in 0..1, sRGB.
"""

import logging
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.diffusion.latent_spaces import LatentSpace
from pusa.errors import PusaError, WeightsError
from pusa.generate.encodings import Encodings, Tensors
from pusa.generate.latents import require_finite
from pusa.generate.outputs import PREVIEW, PREVIEWS
from pusa.generate.sampling import Prepared, pass_after, total_steps
from pusa.system.files import make_own_folder
from pusa.system.text import first_line
from pusa.video.media import write_image
from pusa.video.sheets import film_strip
from pusa.weights.memory import VideoEncoder
from pusa.weights.model import Model

log = logging.getLogger(__name__)
VERSION = 1  # of the drawn clips and of the fit; raise it when either changes
HEIGHT, WIDTH, FRAMES = 160, 960, 6  # of a strip: pixels; pixels and latent frames at most
WAITING = 0.5  # grey, of latent frames that have not begun
CLIPS, SIDE, LATENT_FRAMES = 12, 128, 4  # that the map is fitted to
AT_ONCE = 4  # clips that are encoded together, unless memory runs out
SEED = 20
RIDGE = 1e-3  # times the number of samples, of latents whose variance is near 1: it keeps unusual latents from glaring
GREY_SHARE = 0.25  # of colours that are greys
CATCHABLE = (OSError, PusaError, RuntimeError, MemoryError)  # torch reports a lack of memory as a RuntimeError


class Previews:
    """Writes small pictures of jobs while they are sampled. What goes wrong here is one warning, and costs no job.

    Args:
        folder: the folder of the videos.
        every: the denoising steps of a job from one picture to the next; its last step has one, too. 0 for none.
        model: the model.
        encodings: keep the fitted map, for all runs.
    """

    def __init__(self, folder: Path, every: int, model: Model, encodings: Encodings) -> None:
        self.folder, self.every, self.model, self.encodings = folder, every, model, encodings
        self._map_C1c: Tensor | None = None  # on the model's device
        self._warned = False

    def fit(self) -> None:
        """Fit the map, unless that is done: before sampling, so that the VAE need not lie beside the transformer.

        Without one, as where the VAE has too little memory, there are no previews.
        """
        if not self.every or self._map_C1c is not None:
            return
        try:
            made = self.encodings.of_vae("colours", VERSION, self._fitted)
        except WeightsError:  # the videos could not be decoded, either
            raise
        except CATCHABLE as error:
            self._warn(error, "no previews are written")
            self.every = 0
        else:
            self._map_C1c = made["map"].to(self.model.device)

    def _fitted(self) -> tuple[Tensors, bool]:
        return {"map": fit_colours(self.model)}, True

    def show(self, company: Sequence[Prepared], ids: Set[str], done: int, x0_BCFhw: Tensor) -> None:
        """Write the pictures of the jobs with these ids, if it is time.

        Args:
            company: the jobs that are sampled together.
            ids: those of them to show.
            done: the denoising steps that are made, over all passes.
            x0_BCFhw: the current estimate of the clean latents.
        """
        if self._map_C1c is None or not self.every:
            return
        job, geometry = company[0].job, self.model.backbone.geometry  # jobs that share a batch have one timeline
        if done % self.every and done != total_steps(job, geometry):
            return
        passes = job.passes(geometry)
        index, made = pass_after(passes, job.steps, done)
        begun = [start < made for start in passes[index].timeline.starts]
        for row, prepared in enumerate(company):
            if prepared.job.id in ids:
                try:
                    self._write(prepared.job.id, picture(self._map_C1c, x0_BCFhw[row], begun))
                except CATCHABLE as error:
                    self._warn(error, "a preview could not be written")

    def _write(self, id: str, strip: np.ndarray) -> None:
        folder = self.folder / PREVIEWS
        make_own_folder(folder, "previews")  # not the folders above it: of a run that was moved
        write_image(folder / f"{id}{PREVIEW}", strip)

    def _warn(self, error: Exception, what: str) -> None:
        if not self._warned:
            log.warning("%s: %s", what, first_line(error))
        self._warned = True


def picture(map_C1c: Tensor, z_CFhw: Tensor, begun: Sequence[bool]) -> np.ndarray:
    """Return a strip (H, W, 3) uint8 of latent frames that are spread over a clip, at most 160 pixels high.

    Args:
        map_C1c: the map, on the device of the latents.
        z_CFhw: the latents.
        begun: for each latent frame, whether its denoising has begun; others are grey.
    """
    count, height, width = z_CFhw.shape[1:]
    most = min(FRAMES, max(1, WIDTH * height // (HEIGHT * width)))  # so that each is still large enough
    shown = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    x_Fhwc = torch.einsum("cfhw,cd->fhwd", z_CFhw[:, shown].to(map_C1c), map_C1c[:-1]) + map_C1c[-1]
    x_Fhwc[[not begun[frame] for frame in shown]] = WAITING
    small = (x_Fhwc.nan_to_num(WAITING).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return film_strip(small, HEIGHT, Image.Resampling.BICUBIC, WIDTH)


def fit_colours(model: Model) -> Tensor:
    """Fit the map (C + 1, 3) to the mean colours of what each place of the latents of drawn clips shows.

    Raises:
        NoMemoryError: the VAE cannot encode them in the memory there is.
        NotFiniteError: the VAE computes values that are not finite.
    """
    geometry = model.backbone.geometry
    clips_BTHWC = draw_clips(geometry)
    encoder = VideoEncoder(model)  # of its own: what memory suffices for here is nothing to the jobs' clips
    means = [encoder.encode(clips_BTHWC[i : i + AT_ONCE])[0] for i in range(0, CLIPS, AT_ONCE)]
    require_finite(torch.cat(means), "the latents of the drawn clips")
    space = LatentSpace(model.space.mean, model.space.std)  # `enter` is what `leave` undoes, in the published space too
    z_nC = space.enter(torch.cat(means).double()).movedim(1, -1).flatten(0, -2)
    y_nc = mean_colours(clips_BTHWC, geometry).flatten(0, -2)
    centre_C, centre_c = z_nC.mean(0), y_nc.mean(0)
    z_nC, y_nc = z_nC - centre_C, y_nc - centre_c
    ridge = RIDGE * len(z_nC) * torch.eye(z_nC.shape[1]).to(z_nC)
    map_Cc = torch.linalg.solve(z_nC.T @ z_nC + ridge, z_nC.T @ y_nc)
    return torch.cat([map_Cc, (centre_c - centre_C @ map_Cc)[None]]).float()


def mean_colours(frames_BTHWC: np.ndarray, geometry: Geometry) -> Tensor:
    """Return the mean colour of the pixels of each place of the latents, (B, F, h, w, 3) in 0..1."""
    step, count = geometry.spatial, geometry.latent_frames(frames_BTHWC.shape[1])
    x = torch.from_numpy(frames_BTHWC).double() / 255
    x_BFHWC = torch.stack([x[:, geometry.frames_of(frame)].mean(1) for frame in range(count)], 1)
    return x_BFHWC.unflatten(3, (-1, step)).unflatten(2, (-1, step)).mean((3, 5))


def draw_clips(geometry: Geometry) -> np.ndarray:
    """Draw clips (B, T, H, W, 3) uint8 like nature's in their statistics, of two kinds in turn: still ones and moving.

    Each has a ground whose spectrum falls with the frequency, as that of photographs does, and shapes with edges.
    """
    side = -(-SIDE // geometry.pixel_step) * geometry.pixel_step
    rng = np.random.default_rng(SEED)
    return np.stack([_draw(rng, side, geometry.num_frames(LATENT_FRAMES), still=i % 2 == 0) for i in range(CLIPS)])


def _draw(rng: np.random.Generator, side: int, frames: int, still: bool) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    ground = _field(rng, side)
    shapes = [(rng.uniform(0.15, 0.85, 2), rng.uniform(0.06, 0.24), _colour(rng), rng.random() < 0.5) for _ in range(5)]
    speeds = np.zeros((6, 2)) if still else rng.uniform(-0.25, 0.25, (6, 2)) / frames  # of the ground and the shapes
    drawn = 1 if still else frames
    clip = np.empty((drawn, side, side, 3))
    for t in range(drawn):
        clip[t] = np.roll(ground, (speeds[0] * t * side).round().astype(int), (0, 1))
        for (centre, radius, colour, is_round), speed in zip(shapes, speeds[1:], strict=True):
            dy, dx = y - centre[0] - speed[0] * t, x - centre[1] - speed[1] * t
            distance = np.hypot(dx, dy) if is_round else np.maximum(abs(dx), abs(dy))
            alpha = np.clip((radius - distance) * side + 0.5, 0, 1)[..., None]
            clip[t] += alpha * (colour - clip[t])
    return (np.clip(clip, 0, 1) * 255).round().astype(np.uint8).repeat(frames // drawn, 0)


def _field(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw a ground (side, side, 3) from one colour to another, along a smooth field and a gradient."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None]) * side
    spectrum = np.fft.fft2(rng.standard_normal((3, side, side))) / np.maximum(frequency, 1) ** rng.uniform(1, 2)
    fields = np.fft.ifft2(spectrum).real
    fields /= fields.std((1, 2), keepdims=True)
    one, other = _colour(rng), _colour(rng)
    along = np.clip(0.5 + 0.3 * fields[0] + rng.uniform(-0.5, 0.5) * np.linspace(-1, 1, side), 0, 1)[..., None]
    mixed = one + along * (other - one) + 0.06 * rng.random() * np.moveaxis(fields, 0, -1)
    return np.asarray(mixed)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour (3,): a grey, or one of any saturation."""
    grey, colour = rng.uniform(0, 1), rng.uniform(0, 1, 3)
    return np.full(3, grey) if rng.random() < GREY_SHARE else colour
