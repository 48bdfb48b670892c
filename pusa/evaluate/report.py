"""Write the quality report: a table for the terminal, the same as a page, and strips of both models' videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pusa.errors import PartlyFailed
from pusa.evaluate.cases import Case
from pusa.evaluate.metrics import Result
from pusa.system.failures import Failure
from pusa.system.files import atomic, write_text
from pusa.system.text import join_lines, markdown

STRIP_CLIPS, STRIP_FRAMES = slice(1, 3), 10  # which clips have strips, and the frames of each strip
PICTURE, BAR, GAP = 48, 3, 3  # pixels
LABEL_WIDTH, HEADING_HEIGHT, FONT_SIZE = 176, 24, 12
JPEG_QUALITY = 80
GIVEN_COLOUR = (236, 128, 16)

Results = dict[str, list[Result | Failure]]  # by the case's name; a video that failed has why in its place
Row = tuple[str, str, str]  # a metric's name, its value for the base, and for Pusa


@dataclass(frozen=True)
class Report:
    """What was measured and how, the rows of each case by its name, and strips of the videos (H, W, 3) uint8."""

    about: tuple[str, ...]
    cases: Sequence[Case]
    rows: dict[str, list[Row]]
    sheet: np.ndarray
    failed: tuple[str, ...] = ()  # videos that could not be made or measured: the numbers are of the others

    def require_all(self) -> None:
        """Raise PartlyFailed if videos failed."""
        if self.failed:
            raise PartlyFailed(join_lines(f"{len(self.failed)} videos failed:", self.failed))

    def text(self) -> str:
        """Return a table of fixed width."""
        lines = [*self.about, "", f"{'':42}{'base':>8}{'pusa':>8}"]
        for case in self.cases:
            lines += ["", case.name, *(f"  {name:40}{base:>8}{pusa:>8}" for name, base, pusa in self.rows[case.name])]
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return the same table as a page that also explains each case and each number."""
        meanings = {metric.name: metric.meaning for case in self.cases for metric in case.metrics}
        lines = ["# What one level for each frame adds to the tiny model", ""]
        lines += [*(f"- {markdown(line)}" for line in self.about)]
        lines += ["", "![strips of both models](quality.jpg)", "", "Given frames are underlined.", ""]
        lines += ["| | base | pusa |", "|---|---:|---:|"]
        for case in self.cases:
            lines += [f"| **{case.name}** | | |", *(f"| {' | '.join(row)} |" for row in self.rows[case.name])]
        lines += ["", "## The cases", "", *(f"- **{case.name}**: {case.description}" for case in self.cases)]
        lines += ["", "## The numbers", "", "Each is the mean over the clips, or the number of clips.", ""]
        lines += [f"- **{name}**: {means}" for name, means in meanings.items()]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write `quality.md` and `quality.jpg`; return their paths."""
        page, picture = folder / "quality.md", folder / "quality.jpg"
        with atomic(picture) as partial:
            Image.fromarray(self.sheet).save(partial, quality=JPEG_QUALITY, optimize=True)
        write_text(page, self.markdown())
        return [page, picture]


def compare_results(about: Sequence[str], cases: Sequence[Case], base: Results, pusa: Results) -> Report:
    """Measure the results of both models, and draw strips of some."""
    rows = {
        case.name: [
            (metric.name, metric.summarize(_made(base[case.name])), metric.summarize(_made(pusa[case.name])))
            for metric in case.metrics
        ]
        for case in cases
    }
    first = base[cases[0].name][STRIP_CLIPS]
    captions = ["" if isinstance(result, Failure) else result.clip.scene.caption for result in first]
    width = STRIP_FRAMES * PICTURE + GAP
    heading = [_draw_text("", LABEL_WIDTH, HEADING_HEIGHT)]
    heading += [_draw_text(caption, width, HEADING_HEIGHT) for caption in captions]
    strips = [_case_strips(case.name, base[case.name], pusa[case.name]) for case in cases]
    failed = [
        f"{name}, {case}, clip {number}: {result.message}"
        for name, results in (("base", base), ("pusa", pusa))
        for case, of_case in results.items()
        for number, result in enumerate(of_case)
        if isinstance(result, Failure)
    ]
    sheet = np.concatenate([np.concatenate(heading, 1), *strips])
    return Report((*about, *failed), cases, rows, sheet, tuple(failed))


def _made(results: Sequence[Result | Failure]) -> list[Result]:
    return [result for result in results if isinstance(result, Result)]


def _case_strips(name: str, base: Sequence[Result | Failure], pusa: Sequence[Result | Failure]) -> np.ndarray:
    """Return the base's strips of a case above Pusa's, each with the same clips from left to right."""
    height = PICTURE + BAR + GAP
    lines = [
        np.concatenate([_draw_text(label, LABEL_WIDTH, height), *map(_strip, results[STRIP_CLIPS])], 1)
        for label, results in ((f"{name}\nbase", base), ("pusa", pusa))
    ]
    return np.pad(np.concatenate(lines), ((0, 2 * GAP), (0, 0), (0, 0)), constant_values=255)


def _strip(result: Result | Failure) -> np.ndarray:
    """Return frames of a video from first to last, and of a loop the first again, with a bar under given ones."""
    if isinstance(result, Failure):
        return _draw_text("failed", STRIP_FRAMES * PICTURE + GAP, PICTURE + BAR + GAP)
    video = np.concatenate([result.video, result.video[:1]]) if result.cyclic else result.video
    chosen = np.linspace(0, len(video) - 1, STRIP_FRAMES).round().astype(int).tolist()
    pictures = [Image.fromarray(video[i]).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS) for i in chosen]
    frames = np.concatenate([np.asarray(picture) for picture in pictures], 1)
    bars = np.full((BAR + GAP, frames.shape[1], 3), 255, np.uint8)
    for place, frame in enumerate(chosen):
        if frame % len(result.video) in result.given:
            bars[:BAR, place * PICTURE : (place + 1) * PICTURE] = GIVEN_COLOUR
    return np.pad(np.concatenate([frames, bars]), ((0, 0), (0, GAP), (0, 0)), constant_values=255)


def _draw_text(text: str, width: int, height: int) -> np.ndarray:
    """Return a picture of a text, black on white."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((3, 3), text, "black", ImageFont.load_default(FONT_SIZE))
    return np.asarray(image)
