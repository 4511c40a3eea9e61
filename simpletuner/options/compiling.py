"""Options that make a step faster: what PyTorch compiles."""

from __future__ import annotations

from typing import Literal

from simpletuner.options.option import Section, option

GRAPHS = "CUDA graphs have not been tried out here: take max-autotune-no-cudagraphs, or leave dynamo_mode out"


class Compiling(Section):
    """What is compiled before it trains."""

    dynamo_backend: Literal["no", "inductor"] = option("no")
    """Compile the blocks of the denoiser: `inductor` is PyTorch's own compiler. The first start takes minutes longer, later ones find most of it
    in `cache_dir`; pictures and evaluation compute as before. What cannot be compiled trains as before, and the run says so."""

    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] = option(
        "default", instead={"reduce-overhead": GRAPHS, "max-autotune": GRAPHS}, advanced=True
    )
    """How long the compiler looks for fast kernels: `max-autotune-no-cudagraphs` times several of each on this machine, which takes long."""

    dynamo_dynamic: bool = option(True, advanced=True)
    """Compile once for pictures and captions of all sizes. Without it each size is compiled when it first comes, 64 at most."""
