"""The process and its device: threads, determinism, and which process of how many this is."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from simpletuner.errors import ConfigError
from simpletuner.options.train_config import TrainConfig

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that indexes, or renders; the launcher ends them if it dies."""


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Set up this process and give its accelerator.

    Raises:
        ConfigError: the device cannot do what the options ask.
    """
    training = config.training
    # The default of one thread a core is torch's own; another trainer's fixed 8 costs up to 75 % on 2 cores.
    if training.torch_num_threads:
        torch.set_num_threads(training.torch_num_threads)
    if training.deterministic:
        # cuBLAS reads this once, at its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # LyCORIS' own kernels add gradients up atomically, in whatever order they come.
        os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")
        torch.use_deterministic_algorithms(True)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[patience]
    )  # weights are held in their dtype; the one autocast there is stands in the trainer
    if config.memory.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision fp16 needs an accelerator; this machine trains on its CPU", hint="Set mixed_precision to bf16 or no.")
    if torch.cuda.is_available() and config.memory.mixed_precision != "no":  # "no" promises float32
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator
