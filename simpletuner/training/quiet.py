"""Libraries announce their own future and missing GPU kernels; nothing in it is for the user of a run to do."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Keep such lines off the screen. To be called before the libraries are imported: some speak at once."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("torchao", "diffusers", "transformers", "peft", "torch.utils._pytree", "torch.distributed.elastic", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Both keep loggers of their own that are set up at import, from these.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not os.isatty(1) else "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
