"""`pusa check` of a fine-tune whose base is on a hub reads what is in the cache and downloads nothing."""

from pusa.finetune.check import check_finetune
from pusa.manifest.models import FinetuneManifest
from pusa.weights.resolve import BUILTIN, locate_config

NAME = "org/tiny"


def test_names_are_compared_with_the_base_once_its_configuration_is_here(empty_hub, tmp_path, monkeypatch):
    files = {p.relative_to(BUILTIN / "tiny").as_posix(): p for p in (BUILTIN / "tiny").rglob("*") if p.is_file()}
    empty_hub.add(NAME, {name: path.read_bytes() for name, path in files.items()})
    manifest = FinetuneManifest.model_validate(
        {"base": {"weights": f"hf:{NAME}"}, "train": {"method": "lora", "targets": ["to_qu"]}}
    )

    def checked() -> tuple[list[str], list[str]]:
        notes: list[str] = []
        empty_hub.sent.clear()
        return list(check_finetune(manifest, tmp_path / "run", notes.append)), notes

    wrong, notes = checked()
    assert wrong == [] and len(notes) == 2 and "once it is downloaded" in notes[1] and not empty_hub.sent
    locate_config(manifest.base, "transformer")
    wrong, notes = checked()
    assert "'to_qu' matches the end of no linear layer's name" in wrong[0] and len(notes) == 1 and not empty_hub.sent
