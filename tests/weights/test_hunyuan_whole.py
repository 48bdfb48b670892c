"""A whole export of a HunyuanVideo: both text encoders and both tokenizers are there, for diffusers' pipeline too."""

import shutil

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from pusa.api.pipeline import PusaPipeline
from pusa.backbones.hunyuan_video.text import CLIP_TOKENS, LARGEST_ENDS
from pusa.backbones.hunyuan_video.tiny import CLIP, LLAMA
from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel
from pusa.system.files import read_json
from pusa.weights.whole import export_pipeline
from pusa.weights.write import config_of, write_transformer
from tests.helpers.small_hunyuan_model import write_hunyuan
from tests.helpers.small_tokenizers import write_clip_vocabulary, write_llama_tokenizer


@pytest.fixture
def base(tmp_path):
    """Return a base whose tokenizers are as those of the published model: CLIP's is a vocab.json with a merges.txt."""
    folder = write_hunyuan(tmp_path / "base")
    for part in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / part)
    llama = LlamaConfig(
        **{**LLAMA, "max_position_embeddings": 400}, vocab_size=write_llama_tokenizer(folder / "tokenizer")
    )
    clip = CLIPTextConfig(
        **{**CLIP, "max_position_embeddings": CLIP_TOKENS, "eos_token_id": LARGEST_ENDS},
        vocab_size=write_clip_vocabulary(folder / "tokenizer_2"),
    )
    LlamaModel(llama).save_pretrained(folder / "text_encoder")
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder_2")
    return folder


@torch.no_grad()
def test_all_parts_are_exported_and_diffusers_encodes_the_same_text(base, tmp_path):
    tuned = PusaHunyuanVideoTransformer3DModel.from_pretrained(base / "transformer")
    tuned.proj_out.weight.add_(1)
    record = {"backbone": "hunyuan_video", "latent_space": "dit", "recipe": {"embedded_guidance": 1.0}}
    record["base"] = {"backbone": "hunyuan_video", "weights": str(base)}
    write_transformer(tmp_path / "00000009/transformer", tuned.state_dict(), config_of(tuned), record)
    export_pipeline(tmp_path / "00000009", tmp_path / "out")
    index = read_json(tmp_path / "out/model_index.json")
    assert index["text_encoder"] == ["transformers", "LlamaModel"]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModel"]
    assert "| embedded_guidance | 1.0 |" in (tmp_path / "out/README.md").read_text().replace("`", "")
    ours, theirs = (cls.from_pretrained(tmp_path / "out") for cls in (PusaPipeline, HunyuanVideoPipeline))
    assert torch.equal(ours.transformer.proj_out.weight, tuned.proj_out.weight)
    for prompt in ("a red circle moves right", ""):
        text = ours._model().encode_text([prompt])
        features, pooled, mask = theirs.encode_prompt(prompt)
        assert torch.equal(text.mask, mask.bool()) and torch.equal(text.pooled, pooled)
        assert torch.equal(text.features[text.mask], features[text.mask])
