"""What a checkpoint holds for use: the transformer, or the LoRA alone, and in every file where it comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pusa.training.checkpoint import WriteResult
from pusa.training.settings import Full, Lora, Partial
from pusa.weights.addition import LORA_FOLDER
from pusa.weights.lora import write_lora
from pusa.weights.write import config_of, write_transformer


def result_writer(transformer: Any, method: Full | Partial | Lora, record: Mapping[str, Any]) -> WriteResult:
    """How a checkpoint's folder gets it."""
    config = config_of(transformer)

    def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if isinstance(method, Lora):
            write_lora(folder / LORA_FOLDER, tensors, method, record)
        else:
            write_transformer(folder / "transformer", tensors, config, record)

    return write
