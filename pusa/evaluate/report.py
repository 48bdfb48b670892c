"""The quality report: a table for the terminal, the same as a page, and strips of both models' videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pusa.evaluate.cases import Case
from pusa.evaluate.metrics import Result
from pusa.system.files import atomic, write_text

SHOWN_CLIPS, SHOWN_FRAMES = slice(1, 3), 10
PICTURE, BAR, GAP = 48, 3, 3  # pixels
LABEL, LETTERS = 176, 12
QUALITY = 80
GIVEN = (236, 128, 16)

Results = dict[str, list[Result]]  # of each case, by its name
Row = tuple[str, str, str]  # a metric's name, and what it is of the base and of Pusa


@dataclass(frozen=True)
class Report:
    """What was measured: of each case the rows, by its name, and a contact sheet (H, W, 3) uint8."""

    about: tuple[str, ...]
    cases: Sequence[Case]
    rows: dict[str, list[Row]]
    sheet: np.ndarray

    def text(self) -> str:
        """A table of fixed width."""
        lines = [*self.about, "", f"{'':42}{'base':>8}{'pusa':>8}"]
        for case in self.cases:
            lines += ["", case.name, *(f"  {name:40}{base:>8}{pusa:>8}" for name, base, pusa in self.rows[case.name])]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The same table as a page, which also says what each case and each number is."""
        meanings = {metric.name: metric.means for case in self.cases for metric in case.metrics}
        lines = ["# What a level per frame adds to the tiny family", "", *(f"- {line}" for line in self.about)]
        lines += ["", "![strips of both](quality.jpg)", "", "Given frames are underlined.", ""]
        lines += ["| | base | pusa |", "|---|---:|---:|"]
        for case in self.cases:
            lines += [f"| **{case.name}** | | |", *(f"| {' | '.join(row)} |" for row in self.rows[case.name])]
        lines += ["", "## The cases", "", *(f"- **{case.name}**: {case.told}" for case in self.cases)]
        lines += ["", "## The numbers", "", "Each is the mean over the clips, or a count of them.", ""]
        lines += [f"- **{name}**: {means}" for name, means in meanings.items()]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write `quality.md` and `quality.jpg`."""
        page, picture = folder / "quality.md", folder / "quality.jpg"
        with atomic(picture) as partial:
            Image.fromarray(self.sheet).save(partial, quality=QUALITY, optimize=True)
        write_text(page, self.markdown())
        return [page, picture]


def compare(about: Sequence[str], cases: Sequence[Case], base: Results, pusa: Results) -> Report:
    """Read the metrics off the results of both models."""
    rows = {
        case.name: [(m.name, m.told(base[case.name]), m.told(pusa[case.name])) for m in case.metrics] for case in cases
    }
    strips = [_pair(case.name, base[case.name], pusa[case.name]) for case in cases]
    captions = [result.clip.scene.caption for result in base[cases[0].name][SHOWN_CLIPS]]
    return Report(tuple(about), cases, rows, np.concatenate([_heading(captions), *strips]))


def _heading(captions: Sequence[str]) -> np.ndarray:
    """The clips' captions, each over its strips."""
    width = SHOWN_FRAMES * PICTURE + GAP
    return np.concatenate([_text("", LABEL, 24), *(_text(caption, width, 24) for caption in captions)], 1)


def _pair(name: str, base: Sequence[Result], pusa: Sequence[Result]) -> np.ndarray:
    """The base's strips of a case above Pusa's, a few clips side by side."""
    height = PICTURE + BAR + GAP
    lines = [
        np.concatenate([_text(label, LABEL, height), *map(_strip, results[SHOWN_CLIPS])], 1)
        for label, results in ((f"{name}\nbase", base), ("pusa", pusa))
    ]
    return np.pad(np.concatenate(lines), ((0, 2 * GAP), (0, 0), (0, 0)), constant_values=255)


def _strip(result: Result) -> np.ndarray:
    """Frames from the first to the last, and of a loop the first again; a bar under given ones."""
    video = np.concatenate([result.video, result.video[:1]]) if result.cyclic else result.video
    chosen = np.linspace(0, len(video) - 1, SHOWN_FRAMES).round().astype(int).tolist()
    pictures = [Image.fromarray(video[i]).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS) for i in chosen]
    frames = np.concatenate([np.asarray(picture) for picture in pictures], 1)
    bars = np.full((BAR + GAP, frames.shape[1], 3), 255, np.uint8)
    for place, frame in enumerate(chosen):
        if frame % len(result.video) in result.given:
            bars[:BAR, place * PICTURE : (place + 1) * PICTURE] = GIVEN
    return np.pad(np.concatenate([frames, bars]), ((0, 0), (0, GAP), (0, 0)), constant_values=255)


def _text(text: str, width: int, height: int) -> np.ndarray:
    """Black on white."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((3, 3), text, "black", ImageFont.load_default(LETTERS))
    return np.asarray(image)
