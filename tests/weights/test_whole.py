"""A whole export is read by the pipeline, by a manifest and by diffusers; a kill at any moment leaves no half of it."""

import errno
import json
import logging
import shutil

import pytest
import torch
import yaml
from diffusers import MochiPipeline, WanPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from flows.commands import main
from pusa.api.pipeline import PusaPipeline
from pusa.errors import StageError, WeightsError
from pusa.generate.sampling import sample_job
from pusa.manifest.models import ModelSpec
from pusa.tasks.text_to_video import TextToVideo
from pusa.video.media import write_image
from pusa.weights import whole
from pusa.weights.card import LICENCES, Card, find_sheet, is_unedited, write_card
from pusa.weights.convert import convert
from pusa.weights.export import export
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN
from pusa.weights.stored import read_model
from pusa.weights.whole import export_pipeline
from pusa.weights.write import config_of, write_transformer
from tests.helpers.fine_tunes import close, lineage, output
from tests.helpers.small_wan import new_wan_transformer, write_wan_2_2_a14b

KEYS = {"prompt": "a red circle", "width": 32, "height": 32, "num_frames": 13, "steps": 2, "guidance": 1, "seed": 3}


def latents(spec, **keys) -> torch.Tensor:
    """Return the latents of a manifest's job."""
    return sample_job(TextToVideo(id="a", **{**KEYS, **keys}), Model(ModelSpec.model_validate(spec), "cpu"))


def through_pipeline(folder) -> torch.Tensor:
    pipe = PusaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    size = {key: KEYS[key] for key in ("width", "height", "num_frames")}
    made = pipe("a red circle", **size, num_inference_steps=2, guidance_scale=1, generator=3, output_type="latent")
    return made.frames[0]


def contents(folder) -> dict:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def diffusers_log(monkeypatch):
    """Let caplog see what diffusers logs."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)


@pytest.mark.usefixtures("diffusers_log")
def test_a_full_fine_tune_with_all_parts_of_its_base(tmp_path, caplog):
    made = export_pipeline(BUILTIN / "tiny-pusa", tmp_path / "out", "builtin:tiny")
    assert made[-1] == tmp_path / "out/model_index.json" and all(path.exists() for path in made)
    expected = latents({"weights": "builtin:tiny-pusa"})
    assert torch.allclose(latents({"weights": str(tmp_path / "out")}), expected, atol=1e-4)
    assert torch.allclose(through_pipeline(tmp_path / "out"), expected, atol=1e-4)
    theirs = MochiPipeline.from_pretrained(tmp_path / "out")
    assert "but are not expected" not in caplog.text
    tuned = load_file(BUILTIN / "tiny-pusa/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(theirs.transformer.proj_out.weight, tuned["proj_out.weight"].float())
    kept = lineage(tmp_path / "out/transformer")
    assert kept["exported"] == "pipeline" and kept["latent_space"] == "dit"


def test_a_lora_is_merged_into_the_recorded_base(tmp_path, capsys):
    """The record names the base, as that of a checkpoint does."""
    folder = tmp_path / "run/checkpoints/00000003/lora"
    folder.mkdir(parents=True)
    shutil.copy(BUILTIN / "tiny-wan-pusa/pytorch_lora_weights.safetensors", folder)
    words = ["weights", "export", str(folder.parent), str(tmp_path / "out"), "--to", "pipeline"]
    assert main(words) == 1
    assert "does not record its base; name the base with --base" in capsys.readouterr().err
    base = {"backbone": "wan2.1", "weights": "builtin:tiny-wan"}
    tensors, metadata = (
        load_file(folder / "pytorch_lora_weights.safetensors"),
        read_model(folder / "pytorch_lora_weights.safetensors").metadata,
    )
    record = {**json.loads(metadata.get("pusa", "{}")), "base": base}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {**metadata, "pusa": json.dumps(record)})
    assert main([*words, "--strength", "0.5"]) == 0, capsys.readouterr().err
    spec = {**base, "loras": [{"weights": str(folder.parent), "strength": 0.5}]}
    out = {"backbone": "wan2.1", "weights": str(tmp_path / "out")}
    expected = latents(out, noise_schedule="shifted")
    rounded = 0.01  # to fp16, the dtype of the base
    assert torch.allclose(latents(spec, noise_schedule="shifted"), expected, atol=rounded)
    assert torch.allclose(through_pipeline(tmp_path / "out"), expected, atol=1e-4)
    assert WanPipeline.from_pretrained(tmp_path / "out").scheduler is not None
    assert lineage(tmp_path / "out/transformer")["strength"] == 0.5


@pytest.fixture
def expert(tmp_path):
    """Return a small A14B, and a fine-tune of its expert for low levels with a record."""
    base = write_wan_2_2_a14b(tmp_path / "a14b", boundary=0.5)
    tuned = new_wan_transformer(7)
    record = {"expert": "low", "backbone": "wan2.2-a14b", "latent_space": "dit", "step": 9}
    record["base"] = {"backbone": "wan2.2-a14b", "weights": str(base)}
    write_transformer(tmp_path / "00000009/transformer_2", tuned.state_dict(), config_of(tuned), record)
    return base, tmp_path / "00000009"


def test_one_expert_is_exported_with_the_other_one_of_its_base(expert, tmp_path):
    base, tuned = expert
    export_pipeline(tuned, tmp_path / "out")
    spec = {"backbone": "wan2.2-a14b", "weights": str(base), "checkpoint": {"low": str(tuned)}}
    expected = latents(spec, noise_schedule="shifted")
    assert torch.allclose(through_pipeline(tmp_path / "out"), expected, atol=1e-4)
    assert json.loads((tmp_path / "out/model_index.json").read_text())["boundary_ratio"] == 0.5
    high = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / high).read_bytes() == (base / high).read_bytes()


def test_a_base_in_its_original_layout_is_converted(full, base, tmp_path):
    convert(BUILTIN / "tiny/vae", tmp_path / "original", "genmo")
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / "original" / part).symlink_to(BUILTIN / "tiny" / part)
    export_pipeline(full[1], tmp_path / "out", str(tmp_path / "original"))
    vae = load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
    for name, weight in load_file(BUILTIN / "tiny/vae/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(vae[name], weight)
    assert close(output(PusaPipeline.from_pretrained(tmp_path / "out").transformer), output(full[0]))


def differing(a, b) -> set:
    return {str(name) for name in {*a, *b} if a.get(name) != b.get(name)}


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_of_a_base_only_what_a_reader_needs_is_copied_and_shards_with_their_index(tmp_path, variant):
    base = shutil.copytree(BUILTIN / "tiny", tmp_path / "base")
    encoder = T5EncoderModel.from_pretrained(base / "text_encoder")
    shutil.rmtree(base / "text_encoder")
    encoder.save_pretrained(base / "text_encoder", max_shard_size="20KB", variant=variant)
    shards = {path.name.replace(".bf16", "") for path in (base / "text_encoder").glob("*-of-*.safetensors")}
    for name in ("evil.py", "pytorch_model.bin.index.json"):
        (base / "text_encoder" / name).write_text('{"weight_map": {"a": "missing.safetensors"}}')
    export_pipeline(BUILTIN / "tiny-pusa", tmp_path / "out", str(base))
    copied = {path.name for path in (tmp_path / "out/text_encoder").iterdir()}
    assert len(shards) > 2 and copied == shards | {"config.json", "model.safetensors.index.json"}
    expected = latents({"weights": "builtin:tiny-pusa"})
    assert torch.allclose(through_pipeline(tmp_path / "out"), expected, atol=1e-4)

    (tmp_path / "secret").write_text("password")
    (base / "tokenizer/tokenizer_config.json").unlink()
    (base / "tokenizer/tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json is not a JSON object"):
        export_pipeline(BUILTIN / "tiny-pusa", tmp_path / "other", str(base))
    assert not (tmp_path / "other").exists()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("before", [None, "another"])
def test_a_kill_at_any_rename_leaves_nothing_that_loads_and_the_next_run_completes_it(
    expert, tmp_path, monkeypatch, before
):
    _, tuned = expert
    other = write_wan_2_2_a14b(tmp_path / "other", seed=4)
    export_pipeline(tuned, tmp_path / "out")
    complete = contents(tmp_path / "out")
    for point in range(7):
        shutil.rmtree(tmp_path / "out")
        if before:
            export_pipeline(tuned, tmp_path / "out", str(other))
        renames = iter(range(point))

        def publish_or_die(partial, path, renames=renames, done=whole.publish):
            if next(renames, None) is None:
                raise Killed
            done(partial, path)

        with monkeypatch.context() as patched:
            patched.setattr("pusa.weights.whole.publish", publish_or_die)
            try:
                export_pipeline(tuned, tmp_path / "out")
                break
            except Killed:
                assert not (tmp_path / "out/model_index.json").exists()
        export_pipeline(tuned, tmp_path / "out")
        assert differing(contents(tmp_path / "out"), complete) == set()
    assert point == (3 if before else 6)  # every part and the scheduler; of another base, what differs
    assert differing(contents(tmp_path / "out"), complete) == set()


def test_a_full_disk_is_one_error_and_the_next_run_completes_it(expert, tmp_path, monkeypatch):
    _, tuned = expert

    def full_disk(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr("pusa.weights.whole.shutil.copyfile", full_disk)
        export_pipeline(tuned, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".partial*"))
    assert export_pipeline(tuned, tmp_path / "out")[-1].exists()


def test_only_an_earlier_export_is_replaced(expert, tmp_path):
    base, tuned = expert
    out = tmp_path / "out"
    export_pipeline(tuned, out)
    first = contents(out)
    export_pipeline(tuned, out)
    assert contents(out) == first
    edited = out / "vae/config.json"
    edited.write_text(edited.read_text() + "\n")
    with pytest.raises(WeightsError, match="vae exists already and is not as an earlier export wrote it"):
        export_pipeline(tuned, out)
    assert (out / "model_index.json").exists()  # nothing was changed
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/a.tex").touch()
    with pytest.raises(StageError, match="is not empty"):
        export_pipeline(tuned, tmp_path / "thesis")
    for folder in (base, tuned, base / "transformer"):
        with pytest.raises((WeightsError, StageError)):
            export_pipeline(tuned, folder)
    shutil.rmtree(out / "vae")
    export_pipeline(tuned, out)
    assert contents(out) == first


def test_impossible_exports_are_one_clear_error(full, expert, tmp_path):
    base, tuned = expert
    cases = [
        ({"checkpoint": full[1]}, "does not record its base"),
        ({"checkpoint": full[1], "base": str(tmp_path / "none")}, "is not a folder"),
        ({"checkpoint": full[1], "base": str(full[1] / "transformer")}, "has no vae"),
        ({"checkpoint": tuned, "strength": 2.0}, "strength is 2; a finite number can be given, for a LoRA"),
        ({"checkpoint": base / "vae", "base": str(base)}, "has 0 transformers"),
        ({"checkpoint": base / "transformer", "base": "builtin:tiny-wan"}, "expects|fit|not|has"),
    ]
    for arguments, message in cases[:-1]:
        with pytest.raises(WeightsError, match=message):
            export_pipeline(folder=tmp_path / "new/out", **arguments)
        assert not (tmp_path / "new").exists()


# The card.


def front_matter(folder) -> dict:
    """Return the card's front matter, read as the Hub's own library reads it."""
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data == yaml.safe_load(text.split("---")[1])
    return data


def run_python(folder, base) -> None:
    """Run the Python code of a card, up to the call that makes a video."""
    write_image(folder / "picture.png", torch.zeros(16, 16, 3, dtype=torch.uint8).numpy())
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        code = block.split("```")[0].replace("FOLDER", str(folder)).replace('"BASE"', repr(str(base)))
        code = code.replace("picture.png", str(folder / "picture.png"))
        exec("\n".join(line for line in code.splitlines() if not line.startswith(("made =", "video ="))), {})


@pytest.mark.parametrize("to", ["pipeline", "diffusers", "lora"])
def test_the_code_of_a_card_runs(to, tmp_path):
    base = {"pipeline": "tiny", "diffusers": "tiny", "lora": "tiny-wan"}[to]
    tuned = BUILTIN / {"tiny": "tiny-pusa", "tiny-wan": "tiny-wan-pusa"}[base]
    if to == "pipeline":
        export_pipeline(tuned, tmp_path / "out", f"builtin:{base}", licence="mit")
    else:
        export(tuned, tmp_path / "out", to, licence="mit")
    run_python(tmp_path / "out", BUILTIN / base)
    facts = front_matter(tmp_path / "out")
    assert (
        facts["license"] == "mit"
        and facts["library_name"] == "diffusers"
        and ("lora" in facts["tags"]) == (to == "lora")
    )


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (None, {"license": "unknown"}),
        ("  ", {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("My own: ask me", {"license": "other", "license_name": "my-own-ask-me"}),
        ("\u00a7\n---\nlicense: mit", {"license": "other"}),
    ],
)
def test_the_licence_of_a_card(licence, expected, tmp_path):
    write_card(tmp_path, Card({}, "lora", "mochi", licence))
    assert expected.items() <= front_matter(tmp_path).items()
    assert ("stated no licence" in (tmp_path / "README.md").read_text()) == (expected == {"license": "unknown"})
    assert all(name == name.lower() for name in LICENCES)


def test_a_card_shows_the_record_and_no_paths_of_this_machine(tmp_path):
    record = {
        "step": 500,
        "latent_space": "dit",
        "base": {"backbone": "mochi", "weights": "/home/me/secret/mochi"},
        "recipe": {"base": "ba5e", "latents": "1a7e", "levels": "independent", "train": {"method": "lora", "rank": 4}},
        "data": {"table": "1a7e", "clips": 12, "buckets": {"64x64x31": 12}},
        "versions": {"torch": "2.0"},
    }
    write_card(tmp_path, Card(record, "lora", "mochi"))
    text = (tmp_path / "README.md").read_text()
    for row in (
        "| steps | 500 |",
        "| clips | 12 |",
        r"| train: rank | 4 |",
        r"| levels | independent |",
        "ba5e",
        "1a7e",
    ):
        assert row in text
    assert "/home" not in text and "secret" not in text and '"weights": "BASE"' in text
    hub = {**record, "base": {"weights": "hf:genmo/mochi-1-preview@main"}}
    write_card(tmp_path, Card(hub, "lora", "mochi"))
    assert front_matter(tmp_path)["base_model"] == "genmo/mochi-1-preview"
    assert front_matter(tmp_path)["base_model_relation"] == "adapter"
    assert '"genmo/mochi-1-preview"' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("to", ["pipeline", "diffusers", "lora"])
@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ({"64x64x31": 12, "32x32x31": 20, "64x64x13": 1}, "width=64, height=64, num_frames=31, "),
        (
            {"99999x99999x99999": 1, "9x9x9": 1, "64x64": 1, "-64x64x31": 1, "32x32x7": 1},
            "width=32, height=32, num_frames=7, ",
        ),
        ({"64x64x32": 1}, ""),
        ([], ""),
    ],
)
def test_a_card_calls_for_the_size_of_the_largest_clips_that_were_trained_on(to, buckets, expected, tmp_path):
    write_card(tmp_path, Card({"data": {"buckets": buckets}}, to, "mochi"))
    assert f'pipe("a prompt", conditions=[first], {expected}generator=0, ' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("apache-2.0", "apache-2.0"),
        ("Ask me first. Then use it", "Ask me first. Then use it"),
        ("Don't sell what it's made, ask.", "Don't sell what it's made, ask."),
        ("builtin:tiny", "`builtin:tiny`"),
        ("www.a.com", "`www.a.com`"),
        ("www.1com", "`www.1com`"),
        ("a@b.org", "`a@b.org`"),
        ("_a_ *b*", "`_a_ *b*`"),
        ("1. a", "`1. a`"),
        ("- a\n# b", "`- a\\n# b`"),
        ("a`b", "a\\`b"),
        ("a|b", "a\\|b"),
        ("<b>", "\\<b\\>"),
    ],
)
def test_a_licence_is_shown_literally_with_no_more_marks_than_it_needs(value, shown, tmp_path):
    write_card(tmp_path, Card({}, "lora", "mochi", value))
    assert f"## Licence\n\n{shown}\n" in (tmp_path / "README.md").read_text()


HOSTILE = "<script>alert(1)</script>\n---\n```\n| a | [x](javascript:y) \u202e"


def test_a_hostile_record_is_shown_literally(tmp_path):
    record = {
        "step": HOSTILE,
        "base": {"weights": f"hf:{HOSTILE}"},
        "recipe": {"levels": HOSTILE, "train": {HOSTILE: HOSTILE}, "base": [HOSTILE]},
        "data": {"clips": HOSTILE, "buckets": {HOSTILE: HOSTILE}},
        "versions": [HOSTILE],
        "overrides": [HOSTILE, {"step": HOSTILE}],
        "expert": HOSTILE,
    }
    for to in ("pipeline", "diffusers", "lora", "peft"):
        for broken in (
            record,
            {key: HOSTILE for key in record},
            {key: [1] for key in record},
            {key: {} for key in record},
        ):
            write_card(tmp_path, Card(broken, to, "mochi", HOSTILE))
            text = (tmp_path / "README.md").read_text()
            assert "<script>" not in text and "](javascript" not in text and "\u202e" not in text
            assert text.count("```") % 2 == 0 and text.count("\n---\n") == 1
            assert "base_model" not in front_matter(tmp_path)
            assert is_unedited(tmp_path / "README.md")


def test_a_card_that_somebody_edited_stays(tmp_path, caplog):
    card = Card({}, "lora", "mochi")
    assert write_card(tmp_path, card) == [tmp_path / "README.md"]
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("# A LoRA", "# My model"))
    assert write_card(tmp_path, card) == [] and "# My model" in path.read_text()
    assert "stays as it is" in caplog.text


def test_the_newest_sheet_of_the_run_becomes_the_samples(lora, tmp_path):
    picture = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    for step in (0, 5, 9):
        write_image(lora[1].parent.parent / f"validation/{step:08}.jpg", picture + step)
    assert find_sheet(lora[1].resolve()).name == "00000005.jpg"
    export(lora[1], tmp_path / "out", "lora")
    sheet = lora[1].parent.parent / "validation/00000005.jpg"
    assert (tmp_path / "out/samples.jpg").read_bytes() == sheet.read_bytes()
    assert "![Samples](samples.jpg)" in (tmp_path / "out/README.md").read_text()
    assert find_sheet(tmp_path) is None
