"""How a manifest reaches a flow run: its path, and the hash of its bytes. The run itself reads and checks it.

Prefect limits the parameters of a run to 512 KiB, and relative paths in a manifest start at the file's folder.
Commands read manifests here too, before they import Prefect.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from pusa.errors import ManifestError, PusaError
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import KINDS, GenerateManifest, Manifest
from pusa.system.files import sha256_file
from pusa.system.strict import Strict

Kind = TypeVar("Kind", bound=Manifest)


class ManifestFile(Strict):
    """A manifest's file, as a parameter of a flow."""

    path: Path = Field(description="the absolute path of a YAML file, which the worker must be able to read")
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="the hash of the file's bytes: a file that was changed since is refused; null: take it as it is",
    )

    @classmethod
    def of(cls, path: Path) -> "ManifestFile":
        """Return a file as it is now.

        Raises:
            ManifestError: it cannot be read.
        """
        try:
            return cls(path=path.absolute(), sha256=sha256_file(path))
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error}") from error


def read(file: ManifestFile, run_dir: Path, kind: type[Kind], **changes: Any) -> Kind:
    """Read the manifest of a flow run.

    Args:
        file: where it is.
        run_dir: the folder that RUN/ stands for.
        kind: the class of the manifest.
        changes: values that replace the manifest's own, unless they are None.

    Raises:
        ManifestError: it cannot be read, was changed since its hash was taken, or has problems, each on a line.
    """
    # A hash fixes the content, so that the command, the flow and the name of its run read the file once between them.
    reading: Any = _read_once if file.sha256 else _read_once.__wrapped__
    manifest: Kind = reading(file, run_dir.absolute(), kind)
    return changed(manifest, changes)


def changed(manifest: Kind, changes: Mapping[str, Any]) -> Kind:
    """Return a manifest with these values in place of its own, unless they are None."""
    changes = {name: value for name, value in changes.items() if value is not None}
    copied: Any = manifest.model_copy(update=changes) if changes else manifest
    found: Kind = copied
    return found


@lru_cache(maxsize=4)
def _read_once(file: ManifestFile, run_dir: Path, kind: type[Manifest]) -> Manifest:
    name = next(name for name, known in KINDS.items() if known is kind)
    return load_manifest(file.path, run_dir, name, file.sha256)


def run_name() -> str:
    """Return the name of the flow run that begins: "generate tiny/generate.yaml, 7 jobs", for a stage's flow.

    A manifest with problems is named without its number of jobs: the run itself reports them.
    """
    from prefect.runtime import flow_run

    file, run_dir = flow_run.parameters["manifest"], flow_run.parameters["run_dir"]
    if flow_run.parameters.get("finish"):
        return f"finish {run_dir.name}"
    return describe_run(flow_run.flow_name or "", file, run_dir)


def describe_run(flow: str, file: ManifestFile, run_dir: Path) -> str:
    """Return a name for the run of a stage's flow."""
    name = f"{flow} {file.path.parent.name}/{file.path.name}"
    if flow != "generate":
        return name
    try:
        return f"{name}, {len(read(file, run_dir, GenerateManifest).jobs):,} jobs"
    except (PusaError, OSError):
        return name
