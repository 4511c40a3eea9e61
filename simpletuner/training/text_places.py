"""Which text caches hold which prompts: a dataset's captions lie where its `text_embeds` says, everything else in the default one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from simpletuner.data.loader import prompts_of
from simpletuner.data.plan import DataPlan
from simpletuner.data.store import Store
from simpletuner.data.variation import Expansion


class TextPlaces:
    """The text caches of a run, and what belongs into each."""

    def __init__(self, plan: DataPlan) -> None:
        self._default = Store(plan.text_place)
        by_identity = {self._default.identity: self._default}
        self._of_dataset = {one.id: by_identity.setdefault(one.text_place.identity, Store(one.text_place)) for one in plan.pictures}
        self.stores = tuple(by_identity.values())
        self._of_prompt: dict[str, tuple[Store, ...]] = {}
        """Only where there are several caches."""

    def assign(self, expansions: Mapping[str, Expansion], caption_dropout: float, shown: Iterable[str]) -> dict[str, str]:
        """Settle where each prompt belongs that a run can ask for, and give all of them, each with the caption of which it is a version.

        A caption of several datasets belongs into the caches of all of them; the empty prompt into the default one alone.

        Args:
            expansions: by dataset id.
            shown: prompts of validation.
        """
        prompts = prompts_of(expansions.values(), caption_dropout)
        for text in shown:
            prompts.setdefault(text, text)
        if len(self.stores) > 1:
            found: dict[str, tuple[Store, ...]] = dict.fromkeys(("", *shown), (self._default,))
            same: dict[tuple[Store, ...], tuple[Store, ...]] = {}
            for name, expansion in expansions.items():
                store = self._of_dataset[name]
                for prompt in expansion.prompts:
                    stores = found.get(prompt, ())
                    if prompt and store not in stores:
                        stores = (*stores, store)
                        found[prompt] = same.setdefault(stores, stores)  # one tuple for all alike: there may be a million prompts
            self._of_prompt = found
        return prompts

    def of(self, prompt: str) -> tuple[Store, ...]:
        """Every cache into which a prompt belongs."""
        return self._of_prompt.get(prompt, (self._default,))
