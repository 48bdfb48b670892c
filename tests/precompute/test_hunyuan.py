"""A table of a small HunyuanVideo: pooled text features, the empty prompt in training, and the embedded guidance."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pusa.backbones.hunyuan_video.backbone import HunyuanVideo
from pusa.data.latents import Latents
from pusa.data.loader import MicroBatch, read_rows
from pusa.data.reader import Table
from pusa.data.schema import TEXTS
from pusa.data.writer import write_hashed_shard, write_index
from pusa.errors import StageError, TableError
from pusa.exchange.exporting import export_latents
from pusa.exchange.importing import Settings, import_latents
from pusa.finetune.batch import batch_maker
from pusa.finetune.stage import finetune
from pusa.finetune.validation import validate_checkpoints
from pusa.ingest.stage import ingest
from pusa.inspect.inspection import inspect
from pusa.manifest.models import ClipSettings, FinetuneManifest, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.weights.model import Model
from tests.helpers.small_hunyuan_model import write_hunyuan

POOLED, SIZE = 32, {"width": 32, "height": 32, "num_frames": 9}


@pytest.fixture(scope="module")
def videos(drawn, tmp_path_factory) -> Path:
    """Return a folder with two clips; one has no caption."""
    folder = tmp_path_factory.mktemp("videos")
    for path in (drawn / "videos").glob("000[01].*"):
        shutil.copy(path, folder)
    (folder / "0001.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> ModelSpec:
    return ModelSpec(backbone="hunyuan_video", weights=str(write_hunyuan(tmp_path_factory.mktemp("hunyuan"))))


@pytest.fixture(scope="module")
def run_dir(videos, spec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    clips = ClipSettings(**SIZE, fps=None)
    ingest(IngestManifest(source=videos, backbone="hunyuan_video", clips=clips, missing_captions="empty"), folder)
    assert precompute(PrecomputeManifest(model=spec, dtype="float32"), folder).rows == 2
    return folder


@pytest.fixture(scope="module")
def latents(run_dir) -> Latents:
    return Latents(Table.open(run_dir / "latents"))


def recipe(run_dir: Path, spec: ModelSpec, **changes: object) -> FinetuneManifest:
    settings = {"steps": 1, "batch_size": 2, "checkpoint_every": 1, "caption_dropout": 1.0, **changes}
    return FinetuneManifest.model_validate({"latents": run_dir / "latents", "base": spec.model_dump(), **settings})


def test_text_of_a_table_is_what_the_transformer_is_given_when_it_generates(latents, spec):
    model, captions = Model(spec), latents.table.read("rows")["caption"].to_pylist()
    text, expected = latents.text(range(2)), model.encode_text(captions)
    assert text.pooled.shape == (2, POOLED) and not torch.equal(*text.pooled)
    for name, part in vars(expected).items():
        torch.testing.assert_close(getattr(text, name), part, atol=1e-5, rtol=0)
    null, expected = latents.null_text(), model.encode_text([""])
    assert 0 < null.mask.sum() < text.mask.sum(1).max()
    for name, part in vars(expected).items():
        torch.testing.assert_close(getattr(null, name), part, atol=1e-5, rtol=0)


def test_all_parts_of_the_text_are_in_its_keys_and_none_is_encoded_again(run_dir, spec, tmp_path):
    own = Path(shutil.copytree(run_dir, tmp_path / "own"))
    same = precompute(PrecomputeManifest(clips=run_dir / "clips", model=spec, dtype="float32"), own)
    assert (same.encoded, same.texts) == (0, 0)
    weights = Path(shutil.copytree(spec.weights, tmp_path / "weights"))
    shutil.rmtree(weights / "text_encoder_2")
    shutil.copytree(write_hunyuan(tmp_path / "other", seed=1) / "text_encoder_2", weights / "text_encoder_2")
    other = spec.model_copy(update={"weights": str(weights)})
    changed = precompute(PrecomputeManifest(clips=run_dir / "clips", model=other, dtype="float32"), own)
    assert (changed.encoded, changed.texts) == (0, 2)  # the caption and the empty prompt


def test_a_caption_is_dropped_to_the_tables_empty_prompt(run_dir, spec, latents):
    captioned = int(latents.text(range(2)).mask.sum(1).argmax())
    for share, kept in ((1.0, False), (0.0, True)):
        make = batch_maker(recipe(run_dir, spec, caption_dropout=share), latents, HunyuanVideo().drop_text)
        batch = make(MicroBatch(0, range(1), [captioned]), read_rows(latents, [captioned]))
        expected = latents.text([captioned]) if kept else latents.null_text()
        assert all(torch.equal(part, getattr(expected, name)) for name, part in vars(batch.text).items())


def test_training_and_validation_tell_their_own_guidance(run_dir, spec, tmp_path, monkeypatch):
    told = []
    predict = HunyuanVideo.predict

    def spy(self, transformer, z, sigma_BF, text, embedded_guidance=None):
        assert text.pooled.shape == (len(z), POOLED)
        told.append((transformer.training, embedded_guidance))
        return predict(self, transformer, z, sigma_BF, text, embedded_guidance)

    monkeypatch.setattr(HunyuanVideo, "predict", spy)
    manifest = recipe(run_dir, spec, train={"method": "lora", "rank": 2}, validation={"steps": 1})
    assert (manifest.embedded_guidance, manifest.validation.embedded_guidance, manifest.validation.guidance) == (
        1,
        6,
        1,
    )
    made = finetune(manifest, tmp_path)
    assert set(told) == {(True, 1.0)} and made.last_loss is not None
    record = json.loads((made.checkpoint / "checkpoint.json").read_text())
    assert record["recipe"]["embedded_guidance"] == 1
    told.clear()
    validate_checkpoints(manifest.model_copy(update={"validation": None}), tmp_path)  # the defaults are the family's
    assert set(told) == {(False, 6.0)}
    shown = json.loads((tmp_path / "validation/00000001.json").read_text())
    assert shown["sampling"]["embedded_guidance"] == 6 and "missing" not in shown


def test_pooled_features_are_counted_and_have_no_place_in_the_published_layout(run_dir, spec, tmp_path):
    numbers, table = inspect(run_dir / "latents").json(), Table.open(run_dir / "latents")
    arrays = 2 * 2 * Latents(table).posterior([0])[0].numel()
    texts = sum(tokens * width + POOLED for tokens, width in table.read("texts")["text_shape"].to_pylist())
    assert numbers["raw_bytes"] == 4 * (arrays + texts)
    with pytest.raises(TableError, match="pooled text features, for which the published layout has no place"):
        export_latents(run_dir / "latents", tmp_path / "export")
    for name in ("videos", "captions"):
        (tmp_path / "published" / name).mkdir(parents=True)
    torch.save({}, tmp_path / "published/videos/a.latent.pt")
    torch.save({}, tmp_path / "published/captions/a.embed.pt")
    with pytest.raises(StageError, match="hunyuan_video has pooled text features, which the published files lack"):
        import_latents(tmp_path / "published", tmp_path / "table", Settings(spec))


def test_a_table_of_an_earlier_version_is_kept_as_it_is(made, tmp_path):
    """Its texts have no column for pooled features."""
    run = tmp_path / "run"
    shutil.copytree(made / "latents", run / "latents")
    table = Table.open(run / "latents")
    files = {part: [run / "latents" / entry["name"] for entry in entries] for part, entries in table.parts.items()}
    for number, path in enumerate(files["texts"]):
        facts = json.loads(pq.read_schema(path).metadata[b"pusa"])
        columns = TEXTS.remove(TEXTS.get_field_index("pooled"))
        rows = pq.read_table(path).select(columns.names).replace_schema_metadata()
        prefix = path.stem.rpartition("-")[0]
        files["texts"][number] = write_hashed_shard(run / "latents", prefix, rows, columns, "zstd", facts)
        path.unlink()
    write_index(run / "latents", files, table.facts, hashed=("latents", "texts"))
    before = Latents(Table.open(run / "latents")).text(range(12))
    manifest = PrecomputeManifest(clips=made / "clips", model=ModelSpec.model_validate(table.facts["weights"]))
    again = precompute(manifest, run)
    assert (again.rows, again.encoded, again.texts) == (12, 0, 0)
    text = Latents(Table.open(run / "latents")).text(range(12))
    assert torch.equal(text.features, before.features) and torch.equal(text.mask, before.mask) and text.pooled is None
    assert Table.open(run / "latents").fingerprint == table.fingerprint


def test_the_tiles_that_decided_the_latents_are_recorded(latents):
    settings = {"tile": 256, "tile_stride": 192, "tile_frames": 64, "tile_frames_stride": 48}
    assert latents.table.facts["latent_settings"] == settings
    shards = [latents.table.folder / shard["name"] for shard in latents.table.parts["latents"]]
    assert shards and all(pq.read_table(path)["tile"].to_pylist() == [0, 0] for path in shards)
