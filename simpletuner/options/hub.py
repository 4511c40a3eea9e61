"""Options of the model card, and of publishing on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator

from simpletuner.options.option import Problem, Section, option

PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"


class Hub(Section):
    """Whether the result is published on the hub (huggingface.co, or the server that HF_ENDPOINT names), and what its page says."""

    push_to_hub: bool = option(False, ask="Publish the result on the hub?")
    """Upload the result and its page (README.md, which is written in any case) to a model repository, with the token of `hf auth login` or
    HF_TOKEN."""

    hub_model_id: str | None = option(None)
    """The repository, `name` or `owner/name`. If not given: `tracker_project_name` where that is set, else the name of `output_dir`."""

    push_checkpoints_to_hub: bool = option(False)
    """Also upload the adapter of each checkpoint, as a commit of its own in the same repository; the page then shows the newest one."""

    push_to_hub_background: bool = option(True)
    """Save further checkpoints while one is uploaded; of those that wait, the newest is taken and the others are left out. Otherwise each is
    uploaded before the next one is saved, and training waits where uploads are slow."""

    model_card_private: bool = option(True)
    """Make the repository private, if it is a new one."""

    model_card_safe_for_work: bool = option(False)
    """Say that what the model makes may be shown to anybody. Otherwise the page is marked `not-for-all-audiences`."""

    model_card_note: str | None = option(None)
    """Text of your own for the page, in Markdown."""

    modelspec_comment: str | None = option(None, advanced=True)
    """Text of your own in the adapter file's metadata, under `modelspec.comment`."""

    def problems(self) -> Iterator[Problem]:
        name = self.hub_model_id
        if name and (not re.fullmatch(rf"{PART}(/{PART})?", name) or "--" in name or ".." in name or name.endswith(".git")):
            rule = "letters, digits, '-', '_' and '.', at most 96, with none of '-' and '.' at the ends, no '--', no '..', and no '.git' at the end"
            yield Problem(("hub_model_id",), f"hub_model_id {name!r} is neither name nor owner/name: each part is of {rule}")
