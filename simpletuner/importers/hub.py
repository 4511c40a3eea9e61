"""Publishing on the hub, as other trainers were told to; a token is never written into a file."""

from __future__ import annotations

from simpletuner.importers.importer import Imported

NO_TOKEN = "no token is kept: set the variable HF_TOKEN, or log in by hf auth login"


def use_hub(found: Imported, name: str | None, is_private: bool | None) -> None:
    """Publish the result.

    Args:
        name: of the repository, if there is one.
        is_private: whether a new repository is; None where that trainer makes it public unasked, which is left to the user here.
    """
    found.config["push_to_hub"] = True
    if name:
        found.config["hub_model_id"] = name
    if is_private is None:
        found.note("push_to_hub: a new repository is private here, public there; model_card_private false makes it public")
    else:
        found.config["model_card_private"] = is_private
    found.note(f"push_to_hub: {NO_TOKEN}")
