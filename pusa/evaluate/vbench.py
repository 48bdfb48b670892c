"""Write the videos of a run and their prompts as VBench reads them for `--mode=custom_input`. VBench is not run here.

`FOLDER/vbench/<prompt>-<number>.mp4`, and `FOLDER/prompts.json` with the whole prompt of each file for `--prompt_file`,
since names cannot hold long ones. The latter is removed first and written last: it means that the folder is complete.

Source: `VBench.build_full_info_json` and `get_prompt_from_filename` of github.com/Vchitect/VBench.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pusa.errors import MediaError
from pusa.evaluate.runs import Row
from pusa.generate.outputs import VIDEO
from pusa.system.files import make_own_folder, publish, remove, scratch, write_json
from pusa.system.locks import sole_writer

PROMPTS, VIDEOS = "prompts.json", "vbench"  # no name that a run has: other files in the latter are removed
LONGEST = 180  # bytes of a prompt in a name; file systems allow 255 for all of it
REFUSED = set('/\\:*?"<>|')  # in names, by one file system or another


def write_vbench(rows: Iterable[Row], folder: Path) -> Path:
    """Write the videos that are made, and their prompts; return the path of the prompts.

    A video is a hard link to that of the run where the file system allows it, and else a copy. Other files in `vbench`,
    as of an earlier call, are removed.

    Raises:
        MediaError: no video is made.
        StageError: the folder holds files of somebody else, or is being written.
        OSError: a file could not be read or written.
    """
    made = {row.id: row for row in rows if row.video}
    if not made:
        raise MediaError(f"{folder}: no job has a video to write")
    names = name_videos({id: row.prompt for id, row in made.items()})
    with sole_writer(folder):
        videos = folder / VIDEOS
        make_own_folder(videos, "videos")
        remove(folder / PROMPTS)
        for path in videos.iterdir():
            if path.name not in names.values():
                remove(path)
        for id, name in names.items():
            if video := made[id].video:
                _link_or_copy(video.resolve(), videos / name)
        write_json(folder / PROMPTS, {name: made[id].prompt for id, name in names.items()})
    return folder / PROMPTS


def name_videos(prompts: Mapping[str, str]) -> dict[str, str]:
    """Return a name for each job's video: its prompt, made safe, and its number among those of the same name.

    What upper and lower case alone tell apart counts as the same. A job without a prompt has its id instead.
    """
    counts: Counter[str] = Counter()
    names = {}
    for id, prompt in prompts.items():
        name = _safe(prompt) or id
        names[id] = f"{name}-{counts[name.casefold()]}{VIDEO}"
        counts[name.casefold()] += 1
    return names


def _safe(prompt: str) -> str:
    """Return a prompt as part of a file's name, which is not hidden and leads nowhere else; "" if nothing is left."""
    shown = "".join("_" if character in REFUSED or not character.isprintable() else character for character in prompt)
    return shown.encode()[:LONGEST].decode(errors="ignore").strip(" .")


def _link_or_copy(video: Path, path: Path) -> None:
    with scratch(path) as partial:
        try:
            os.link(video, partial)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(video, partial)
        publish(partial, path)
