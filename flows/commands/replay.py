"""Make a video again from what it says about itself: `pusa replay`."""

from typing import Annotated

from cyclopts import Parameter

from flows.commands.options import File
from flows.console import log_to_console, show


def replay(
    video: File,
    /,
    *,
    manifest: Annotated[File | None, Parameter(metavar="FILE")] = None,
    weights: Annotated[list[File] | None, Parameter(consume_multiple=(1, None), json_list=False)] = None,
    inputs: Annotated[File | None, Parameter(metavar="FOLDER")] = None,
    output: Annotated[File | None, Parameter(metavar="FILE")] = None,
    check: bool = False,
) -> int:
    """Make a video again from the settings in it, and compare all frames, or name the first thing that differs.

    The exit code is 0 if the frames are identical, else 3.

    Args:
        video: An mp4 of `pusa generate`, under any name.
        manifest: A generate manifest whose model is used instead of the one in the video; settings of its job of the
            same id are compared, too.
        weights: Folders or files of the local weights that the video was made with.
        inputs: A folder with inputs that are not beside the video. They are found by their content.
        output: A new file for the video that is made; by default it is removed.
        check: Compare versions, weights, inputs and settings alone, and make nothing.
    """
    from pusa.generate.replay import replay

    log_to_console()
    result = replay(video, manifest=manifest, weights=weights or (), inputs=inputs, output=output, check=check)
    show(result.text())
    return 0 if result.is_identical else 3
