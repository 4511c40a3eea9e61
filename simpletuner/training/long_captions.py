"""Captions of which the model does not see the end: counted when they are first encoded, said at every start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from simpletuner.console import Console

QUOTED = 3
"""Captions that are quoted, the longest first."""
QUOTED_LETTERS = 60


class LongCaptions:
    """How many tokens the captions over the limit have, kept in a file beside the caches, so that a warm start needs no tokenizer."""

    def __init__(self, folder: Path, fingerprint: str, limit: int) -> None:
        """
        Args:
            fingerprint: of the text encoders and tokenizers.
            limit: tokens that the model reads.
        """
        name = hashlib.blake2b(f"{fingerprint} {limit}".encode(), digest_size=8).hexdigest()
        self._path, self._limit = folder / f"long-captions-{name}.json", limit
        self._tokens = self._read()

    def add(self, captions: Sequence[str], tokens: Sequence[int]) -> None:
        """Take in how many tokens captions have."""
        self._tokens.update({caption: count for caption, count in zip(captions, tokens) if count > self._limit})

    def save(self) -> None:
        if not self._tokens:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staged = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        staged.write_text(json.dumps(self._tokens, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        staged.replace(self._path)

    def warn(self, prompts: Mapping[str, str], console: Console) -> None:
        """Count and quote captions that are too long.

        Args:
            prompts: what is encoded, each with the caption of which it is a version: one that is long in all of them counts once.
        """
        over = sorted(((self._tokens[prompt], prompt) for prompt in prompts.keys() & self._tokens.keys()), reverse=True)
        if not over:
            return
        captions = len({prompts[prompt] for _, prompt in over})
        quoted = "; ".join(f"{count} tokens: {caption[:QUOTED_LETTERS]}..." for count, caption in over[:QUOTED])
        who = "1 caption is" if captions == 1 else f"{captions:,} captions are"
        who += f", in {len(over):,} versions," if len(over) > captions else ""
        console.warn(f"{who} longer than the {self._limit} tokens that the model reads; the rest is not seen ({quoted})")

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # nothing yet, or cut short by a full disk
            return {}
        return {str(caption): int(count) for caption, count in found.items()} if isinstance(found, dict) else {}
