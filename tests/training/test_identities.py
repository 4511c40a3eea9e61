"""Large weight files are read once, and that shows."""

from __future__ import annotations

import os
import time

from simpletuner.training import identities
from tests.builders.run import train_in_process, write_run


def test_the_first_start_reads_the_weights_under_a_bar_and_the_next_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(identities, "LARGE_BYTES", 1)
    monkeypatch.setattr(identities, "MEGABYTE", 1000)
    write_run(tmp_path, max_train_steps=1, base_model_precision="int8-quanto")
    for path in (tmp_path / "model").rglob("*.*"):  # what was written a moment ago is not remembered
        os.utime(path, (time.time() - 100,) * 2)
    read = []
    learn = identities.learn
    monkeypatch.setattr(identities, "learn", lambda files, *others: (read.extend(files), learn(files, *others)))

    assert train_in_process(tmp_path) == 0
    assert train_in_process(tmp_path, "--max_train_steps", "2") == 0

    assert {path.parent.name for path in read} == {"text_encoder", "tokenizer", "vae", "transformer"} and len(read) == len(set(read))
