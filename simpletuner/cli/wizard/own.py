"""What the wizard asks beyond options: declared as options are, so that question, check and help come from one field."""

from __future__ import annotations

from typing import Literal

from simpletuner.options.option import REQUIRED, Section, option


class Own(Section):
    """Answers that become files and datasets rather than keys of config.json."""

    name: str = option(REQUIRED, ask="What shall this training be called?")
    """The files go into a folder of this name in config/, and the result into one in output/."""

    pictures: str = option(REQUIRED, ask="In which folder are your pictures?")
    """Folder with the pictures to learn from, those in folders below it too. Nothing in it is changed. Tab completes."""

    card: str = option("none", ask="On which card will this run?")
    """Memory of the card, such as 24GB, where the training is to run on another machine; `none` is the CPU of this one."""

    lokr_factor: int = option(16, ask="Factor of the LoKr?", ge=1)
    """How coarse a LoKr is: a larger factor makes a smaller file that learns less. Usual: 4 to 16."""

    lokr_layers: Literal["attention", "attention+feedforward"] = option("attention+feedforward", ask="Which layers does the LoKr change?")
    """Attention decides what goes where; feed-forward layers hold more of how things look, and make the file about three times as large."""

    renders_captions: bool = option(True, ask="Also render captions of your own pictures?")
    """Write a prompt library with some of the captions: rendered at each validation, they show how near the training has come."""
