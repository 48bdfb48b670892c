"""Where the work runs, and in which precision."""

import torch


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as the base models were trained; fp32 on a CPU, which has little use for less."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def to_model(frames: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float in [-1, 1]."""
    return frames.movedim(-1, 1).float() / 127.5 - 1


def to_frames(x_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    return ((x_BCTHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
