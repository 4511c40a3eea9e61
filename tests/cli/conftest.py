"""An empty folder to work in, an environment that asks for nothing, and a config to start from."""

from __future__ import annotations

import json
import os

import pytest

from simpletuner.cli.locate import ENVIRONMENT_NAMES
from simpletuner.options.sources import PREFIX


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(PREFIX) or name in (*ENVIRONMENT_NAMES, "CONFIG_PATH", "RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def write_config(tmp_path):
    """Write a config that a dry run accepts, and the dataset it names; options are added to it."""

    def write(path="config/config.json", **options):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        datasets = [{"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename"}]
        (tmp_path / "datasets.json").write_text(json.dumps(datasets))
        config = {"model_family": "auraflow", "data_backend_config": "datasets.json", "max_train_steps": 10, **options}
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config))
        return target

    return write
