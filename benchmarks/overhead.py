"""What the trainer costs beyond a bare PyTorch loop: same model, adapter, batch and optimizer, interleaved in one process.

    python benchmarks/overhead.py [--rounds 10] [--steps 4] [--json FILE]

Prints the median step time of both and their ratio with its spread over the rounds. The model is an AuraFlow of some 50 M random
parameters; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
