"""`simpletuner families`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from simpletuner.adapters.key_maps import Layout, check_known
from simpletuner.cli.choices import family_of
from simpletuner.cli.family_page import all_families, exports_of
from simpletuner.cli.main import main
from simpletuner.errors import ConfigError
from simpletuner.training.export import FORMATS

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def test_all_families_and_flavours_are_listed(capsys):
    assert main(["families"]) == 0

    shown = capsys.readouterr().out.split()
    for name, kind in all_families().items():
        assert {name, *kind.flavours, *kind.flavours.values()} <= set(shown)


def test_the_committed_page_is_what_the_families_say(capsys):
    assert main(["families", "--markdown"]) == 0

    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), "run: simpletuner families --markdown > docs/families.md"


def test_the_page_needs_no_torch_and_no_hub():
    code = (
        "import socket, sys; socket.socket.connect = None;"
        "from simpletuner.cli.family_page import all_families, page; page(all_families()); sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_exports_of_a_family_are_those_that_export_does_not_refuse():
    assert set(exports_of(family_of("sdxl"))) == set(FORMATS)
    for kind in all_families().values():
        layout = Layout(kind.denoiser_folder, kind.original_layout, {})
        for name in set(FORMATS) - set(exports_of(kind)):
            try:
                check_known(layout, name)
            except ConfigError:
                continue
            raise AssertionError(f"{name} is not refused")
