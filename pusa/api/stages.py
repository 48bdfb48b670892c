"""Run the stage of a manifest in this process, as its command does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pusa.api.models import AT_WORK
from pusa.errors import ManifestError, PartlyFailed
from pusa.finetune.stage import Finetuned, finetune
from pusa.finetune.validation import validate_after_training
from pusa.generate.stage import Generated, generate
from pusa.ingest.stage import Ingested, ingest
from pusa.manifest.loading import check_mapping, default_run_dir, load_manifest
from pusa.manifest.models import KINDS, FinetuneManifest, Manifest
from pusa.precompute.stage import Precomputed, precompute


def run(
    manifest: str | Path | Mapping[str, Any] | Manifest, run_dir: str | Path | None = None, **options: Any
) -> Ingested | Precomputed | Finetuned | Generated:
    """Run the stage of a manifest's kind, and return its result. What is done already is not done again.

    Notices of the run's end are sent by the commands alone.

    Args:
        manifest: a YAML file; or what it holds, with relative paths relative to the current folder; or a manifest.
        run_dir: the run's folder. Default: as for the commands, runs/<name of the manifest's folder>, which is the
            current folder for what is no file.
        options: as the stage's function has them: `retry_failed=True` for generate, `overrides={key: value}` for
            finetune.

    Raises:
        ManifestError: the manifest cannot be read or has problems; or it is of a fine-tune in several processes.
        PartlyFailed: a part of the work failed; each failure is recorded, and all else is on the disk. The result is
            its `result`.
        PusaError: any other reason why the stage cannot work.
        OSError: nothing more can be written.
    """
    path = Path(manifest) if isinstance(manifest, str | Path) else Path("manifest.yaml")
    folder = (Path(run_dir) if run_dir is not None else default_run_dir(path)).absolute()
    if isinstance(manifest, str | Path):
        checked = load_manifest(path, folder)
    else:
        checked = check_mapping(manifest, folder) if isinstance(manifest, Mapping) else manifest
    if not isinstance(checked, tuple(KINDS.values())):
        kinds = ", ".join(KINDS)
        raise ManifestError(f"got {type(manifest).__name__}; expected a file, a mapping or a manifest: {kinds}")
    with AT_WORK if checked.kind == "generate" else nullcontext():
        result = STAGES[checked.kind](checked, folder, **options)
    if not isinstance(result, Finetuned):
        with _keeping(result):
            result.require_all()
    return result


@contextmanager
def _keeping(result: Any) -> Iterator[None]:
    """Add the result of a stage to a `PartlyFailed`."""
    try:
        yield
    except PartlyFailed as error:
        error.result = result
        raise


def _finetune(manifest: FinetuneManifest, run_dir: Path, **options: Any) -> Finetuned:
    if manifest.parallel.processes > 1:
        raise ManifestError(
            f"parallel: processes is {manifest.parallel.processes}, and this process can be one of them only; "
            "`pusa finetune MANIFEST` starts all, or set it to 1"
        )
    result = finetune(manifest, run_dir, **options)
    if manifest.validation is not None:
        with _keeping(result):
            validate_after_training(manifest, run_dir)
    return result


STAGES: dict[str, Callable[..., Any]] = {
    "ingest": ingest,
    "precompute": precompute,
    "finetune": _finetune,
    "generate": generate,
}
