"""The text cache: every prompt's embeddings, made once, read at each step.

A key is the prompt and the identity of the text encoders, so that an edited caption makes one new entry and other encoders
leave these alone. Measured on CPUs: T5 and CLIP encoders give a prompt the same bits whatever it is batched with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from simpletuner.console import Bar
from simpletuner.data.row_encoder import Row, RowEncoder, is_finite
from simpletuner.data.store import DamagedEntry, Store, key_of
from simpletuner.data.write_behind import WriteBehind
from simpletuner.errors import DatasetError

CODE_VERSION = 1
"""Part of every key; raised whenever prompts come to be encoded otherwise than before."""
HELD_BYTES = 1 << 28
"""Embeddings held in memory by default: a few captions serve many images, and the empty one a tenth of all draws."""
QUOTED = 20
"""Prompts that an error quotes; of more it gives the count."""


class EmbedCache:
    """Embeddings of prompts: from memory, from disk, or else from the encoders. Holds none of these: `encode` may bring them back."""

    def __init__(
        self,
        store: Store | Callable[[str], Sequence[Store]],
        encode: Callable[[Sequence[str]], Mapping[str, Tensor]],
        fingerprint: str,
        batch_size: int,
        *,
        warn: Callable[[str], None],
        held_bytes: int = HELD_BYTES,
    ) -> None:
        """
        Args:
            store: where embeddings are kept, of all prompts or of each: all of these stores hold them.
            encode: B prompts to tensors of the family's own names whose first axis is B.
            fingerprint: identity of all that embeddings depend on besides the prompt.
            batch_size: prompts encoded at once.
            warn: told of entries that had to be made again, and of a batch size that did not fit.
            held_bytes: embeddings kept in memory, the latest used.
        """
        self._stores_of: Callable[[str], Sequence[Store]] = (lambda _: (store,)) if isinstance(store, Store) else store
        self._fingerprint, self._warn = fingerprint, warn
        hint = "Set text_encoder_1_precision (and those of further encoders) to int8-quanto, or a lower tokenizer_max_length."
        self._encoder: RowEncoder[Sequence[str]] = RowEncoder(encode, batch_size, warn, noun="captions", option="text_encoder_batch_size", hint=hint)
        self._held = _Held(held_bytes)

    def key(self, prompt: str) -> str:
        """The key of a prompt's embeddings."""
        return key_of(kind="text", version=CODE_VERSION, encoders=self._fingerprint, prompt=prompt)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those that have to be encoded, each once."""
        return list(self._lacking(prompts))

    def used(self, prompts: Iterable[str]) -> dict[str, set[str]]:
        """The keys of prompts, by identity of the store."""
        used: dict[str, set[str]] = {}
        for prompt in prompts:
            for store in self._stores_of(prompt):
                used.setdefault(store.identity, set()).add(self.key(prompt))
        return used

    def _lacking(self, prompts: Iterable[str]) -> dict[str, list[Store]]:
        """The prompts that have to be encoded, each with the stores that lack it."""
        held: dict[str, set[str]] = {}
        lacking: dict[str, list[Store]] = {}
        for prompt in dict.fromkeys(prompts):
            key = self.key(prompt)
            for store in self._stores_of(prompt):
                if store.identity not in held:
                    held[store.identity] = store.keys()
                if key not in held[store.identity]:
                    lacking.setdefault(prompt, []).append(store)
        return lacking

    def fill(self, prompts: Iterable[str], bar: Bar | None = None) -> None:
        """Encode and keep what is missing; entries are written behind the encoder.

        Raises:
            DatasetError: the encoders' answer to some prompts is not finite; all others are cached.
            MemoryLimitError: one prompt is too much for the encoders, or the disk is full; what was made is kept.
        """
        lacking = self._lacking(prompts)
        missing = list(lacking)
        for store in {store for stores in lacking.values() for store in stores}:
            store.sweep()
        useless: list[str] = []
        size = self._encoder.batch_size
        with WriteBehind(size) as writer:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                for prompt, row in zip(batch, self._encoder.rows(batch)):
                    if not is_finite(row):
                        useless.append(prompt)
                        continue
                    for store in lacking[prompt]:
                        writer.put(store, self.key(prompt), row, self._describe(prompt))
                if bar is not None:
                    bar.advance(len(batch))
        if useless:
            raise _not_finite(useless)

    def read(self, prompt: str) -> Row:
        """The embeddings of one prompt, without a batch axis. They are shared: do not write into them."""
        row = self._held.get(prompt)
        if row is None:
            row = self._stored(prompt) or self._make(prompt)
            self._held.put(prompt, row)
        return row

    def _stored(self, prompt: str) -> Row | None:
        problem = "gone and are made again"
        for store in self._stores_of(prompt):
            try:
                return store.get(self.key(prompt))
            except KeyError:
                continue
            except DamagedEntry as error:
                problem = f"damaged and are made again: {error}"
        self._warn(f"the cached embeddings of {prompt!r} are {problem}")
        return None

    def _make(self, prompt: str) -> Row:
        row = self._encoder.rows([prompt])[0]
        if not is_finite(row):
            raise _not_finite([prompt])
        for store in self._stores_of(prompt):
            store.put(self.key(prompt), row, self._describe(prompt))
        return row

    def _describe(self, prompt: str) -> dict[str, str]:
        return {"kind": "text", "prompt": prompt, "encoders": key_of(encoders=self._fingerprint)}


class NoEmbeds:
    """No cache: whoever trains on the captions encodes them himself."""

    def read(self, prompt: str) -> Row:
        """Nothing."""
        return {}

    def used(self, prompts: Iterable[str]) -> dict[str, set[str]]:
        """Nothing."""
        return {}


class _Held:
    """The rows used last, up to a number of bytes. Safe to use from the loader's threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, prompt: str) -> Row | None:
        with self._lock:
            row = self._rows.get(prompt)
            if row is not None:
                self._rows.move_to_end(prompt)
            return row

    def put(self, prompt: str, row: Row) -> None:
        with self._lock:
            if prompt not in self._rows:
                self._rows[prompt] = row
                self._bytes += _bytes_of(row)
            while self._bytes > self._limit:
                _, oldest = self._rows.popitem(last=False)
                self._bytes -= _bytes_of(oldest)


def _bytes_of(row: Row) -> int:
    return sum(tensor.nbytes for tensor in row.values())


def _not_finite(prompts: Sequence[str]) -> DatasetError:
    quoted = "".join(f"\n  {prompt[:100]!r}" for prompt in prompts[:QUOTED])
    more = f"\n  and {len(prompts) - QUOTED} more" if len(prompts) > QUOTED else ""
    return DatasetError(
        f"the text encoders' answer to {len(prompts)} captions is not finite:{quoted}{more}",
        hint="Encoders overflow in fp16; set mixed_precision to bf16 or no. All other captions are cached.",
    )
