"""Put a run together, in the order that memory allows, and run it."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from simpletuner import __version__, plugins
from simpletuner.adapters.adapter import Adapter, Attached, Targets, kind_of
from simpletuner.console import Console, duration
from simpletuner.data.discover import Discovery, discover
from simpletuner.data.embeds import EmbedCache
from simpletuner.data.images import read_pixels
from simpletuner.data.latents import LatentCache
from simpletuner.data.loader import Loader
from simpletuner.data.plan import DataPlan, load_plan
from simpletuner.data.sampler import Sampler
from simpletuner.data.store import Store
from simpletuner.diffusion.loss import loss_function
from simpletuner.errors import ConfigError
from simpletuner.memory.precision import quantise
from simpletuner.memory.residency import weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.optim.build import build_optimizer, build_schedule
from simpletuner.options.load import Loaded
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.reporting.tracker import start_trackers
from simpletuner.training.caching import TextEncoders, Vae, fill_latents, fill_text
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.ema import Ema
from simpletuner.training.prompts import Picture, pictures
from simpletuner.training.run_folder import make_writable, save_config
from simpletuner.training.signals import StopRequest
from simpletuner.training.state import TrainState
from simpletuner.training.step import Step
from simpletuner.training.summary import DatasetFacts, show_end, show_start
from simpletuner.training.trainer import Pace, Trainer
from simpletuner.training.validation import Gallery, Renderer, label_of
