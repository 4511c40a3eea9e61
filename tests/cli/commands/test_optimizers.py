"""`simpletuner optimizers`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.cli.choices import known_names
from simpletuner.cli.main import main
from simpletuner.errors import ConfigError
from simpletuner.optim.catalogue import OPTIMIZERS
from simpletuner.options.load import load_config
from simpletuner.options.optim import INSTEAD, SHORT
from simpletuner.options.sources import Setting

PAGE = Path(__file__).parents[3] / "docs" / "optimizers.md"
ELSEWHERE = """
    torch-adam torch-adamw torch-sgd torch-radam torch-nadam torch-rmsprop torch-adagrad torch-adadelta torch-adafactor torch-adamax torch-asgd
    torch-sparseadam adamw_bf16 adamw_schedulefree adamw_schedulefree+aggressive adamw_schedulefree+no_kahan soap muon ao-adamw8bit ao-adamw4bit
    ao-adamfp8 ao-adamwfp8 optimi-stableadamw optimi-adamw optimi-lion optimi-radam optimi-ranger optimi-adan optimi-adam optimi-sgd bnb-adagrad
    bnb-adagrad8bit bnb-adam bnb-adam8bit bnb-adamw bnb-adamw8bit bnb-adamw-paged bnb-adamw8bit-paged bnb-ademamix bnb-ademamix8bit
    bnb-ademamix-paged bnb-ademamix8bit-paged bnb-lion bnb-lion8bit bnb-lion-paged bnb-lion8bit-paged prodigy sdnq-adamw sdnq-adamw+no_quant
    sdnq-adafactor sdnq-came sdnq-lion sdnq-muon sdnq-muon+quantized_matmul adafactor dadaptation adamw8bit
"""
"""What configs of the existing tool may name."""


def test_all_optimizers_are_listed(capsys):
    assert main(["optimizers"]) == 0

    assert {row.name for row in OPTIMIZERS} <= set(capsys.readouterr().out.split())


def test_the_committed_page_is_what_the_rows_say(capsys):
    assert main(["optimizers", "--markdown"]) == 0

    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), "run: simpletuner optimizers --markdown > docs/optimizers.md"


def test_the_page_needs_no_torch():
    code = "import sys; from simpletuner.cli.optimizer_page import page; page(); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [*ELSEWHERE.split(), *SHORT, *INSTEAD])
def test_every_name_that_users_write_is_a_row_or_says_what_to_take(name):
    rows = {row.name for row in OPTIMIZERS}
    settings = [Setting("model_family", "auraflow", "test"), Setting("optimizer", name.upper(), "test")]
    if name in INSTEAD:
        with pytest.raises(ConfigError) as error:
            load_config(settings, lambda *_: {}, choices=known_names())
        assert INSTEAD[name] in str(error.value)
        assert any(row in INSTEAD[name] for row in rows)
    else:
        assert load_config(settings, lambda *_: {}, choices=known_names()).config.optim.optimizer in rows
