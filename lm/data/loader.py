"""Loader: the batch of a step, a pure function of (config, step).

    store -> plan of an epoch -> rows, shuffled per epoch -> mixture -> rows of a share -> batch

Rows that are not read from text come from a `Rows`, which generates the batch of a step.

Everything is random access (Grain's MapDataset), so the state is one integer. Each process reads
its share of the rows of the same global batch, whatever the number of processes. The batch size may
grow (lm/data/growth.py); the order of rows does not depend on it. One background thread prefetches;
tokenization was done beforehand. Validation rows come in file order, without shuffling.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import grain
import grain.transforms
import numpy as np

from lm.config import DataConfig, UserError, difference
from lm.data import mixture as mixture_lib
from lm.data import packing
from lm.data.batch import WHOLE, Batch, Share, stack
from lm.data.growth import Batches
from lm.data.mixture import Mixture
from lm.data.packing import Packer, Plan
from lm.data.prepare import Prepared
from lm.data.store import Store

log = logging.getLogger(__name__)

_PREFETCHED_BATCHES = 4
_ENDLESS = 1 << 48  # rows; sys.maxsize overflows inside batch
_INDIVISIBLE = (
    "a batch of {batch_size} rows is not a multiple of the {num_parts} parts of data*fsdp; "
    "set data.batch_size, or data.batch_warmup.first, to a multiple"
)


class Rows(Protocol):
    """Training rows that are generated instead of read from text."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything the rows depend on, except the step; saved in checkpoints."""
        ...

    def batch(self, step: int) -> Batch:
        """The whole batch of a step [B, T]. It depends only on the step; T may differ by step."""
        ...


class Windows(grain.MapDataset):
    """Rows of one source. Index i is row number i % num_rows, in reading order, of epoch i //
    num_rows."""

    def __init__(self, store: Store, packer: Packer, context_length: int, source_id: int):
        super().__init__()
        self._store = store
        self._packer = packer
        self._context_length = context_length
        self._source_id = source_id

    def __len__(self) -> int:
        return self._packer.num_rows

    def __getitem__(self, index: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        epoch, i = divmod(index, self._packer.num_rows)
        plan, order = self._packer.epoch(epoch)
        return window(self._store, plan, order[i], self._context_length, self._source_id)


def window(store: Store, plan: Plan, row: int, context_length: int, source_id: int) -> Batch:
    """One row of a plan as arrays `[T]`. Places after its last piece are padding, all zero."""
    pieces = slice(plan.row_ptr[row], plan.row_ptr[row + 1])
    length = plan.length[pieces]
    begins = np.cumsum(length) - length
    total = int(length.sum())
    positions = np.arange(total) - np.repeat(begins, length)
    index = np.repeat(store.offsets[plan.doc[pieces]] + plan.start[pieces], length) + positions
    segment_ids = np.repeat(np.arange(1, len(length) + 1), length)

    def pad(values: np.ndarray) -> np.ndarray:
        out = np.zeros(context_length, np.int32)
        out[:total] = values
        return out

    return Batch(
        tokens=pad(store.tokens[index]),
        targets=pad(store.tokens[index + 1]),
        segment_ids=pad(segment_ids),
        positions=pad(positions),
        source_ids=np.full(context_length, source_id, np.int32),
        loss_weights=(np.arange(context_length) < total).astype(np.float32),
    )


class Loader:
    """An endless iterator of batches; `state` before step t is {"next_step": t}."""

    def __init__(self, dataset: grain.MapDataset, identity: Mapping[str, Any]):
        self.identity = dict(identity)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        self._iterator = dataset.to_iter_dataset(options).__iter__()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, int]:
        return {"next_step": self._iterator.get_state()["next_index"]}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._iterator.set_state({"next_index": int(state["next_step"])})

    def close(self) -> None:
        """Stops the prefetching thread."""
        self._iterator.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def create(
    prepared: Prepared,
    config: DataConfig,
    *,
    seed: int,
    batches: Batches,
    share: Share = WHOLE,
) -> Loader:
    """A loader of this process's share of the training stream; `batches` are the global ones.

    Raises:
      UserError: the batch does not divide into the parts of the share.
    """
    _check_parts(batches.of(0), share)
    streams, shares = [], []
    for source_id, (name, source) in enumerate(config.sources.items()):
        if source.weight == 0:
            continue
        store = prepared.stores[name]["train"]
        key = (seed, zlib.crc32(name.encode()))
        packer = Packer(store.lengths, config.context_length, config.packing, key)
        rows = Windows(store, packer, config.context_length, source_id)
        streams.append(rows.repeat())
        # A source with more padding needs more rows. Fractions are exact; a float could overflow.
        shares.append(Fraction(source.weight) / Fraction(packer.fill))
    rows = grain.MapDataset.select_from_datasets(streams, _Order(Mixture(shares)))
    dataset = _Batches(rows, batches, share)
    return Loader(dataset, identity(prepared, config, seed, batches))


def generated(rows: Rows, *, batch_size: int, share: Share = WHOLE) -> Loader:
    """A loader of this process's share of generated rows; `batch_size` is the global one.

    Raises:
      UserError: the batch does not divide into the parts of the share.
    """
    _check_parts(batch_size, share)
    return Loader(_Generated(rows, share), rows.identity)


def _check_parts(batch_size: int, share: Share) -> None:
    if batch_size % share.num_parts:
        raise UserError(_INDIVISIBLE.format(batch_size=batch_size, num_parts=share.num_parts))


class _Generated(grain.MapDataset):
    """Item i is this process's share of the batch of step i."""

    def __init__(self, rows: Rows, share: Share):
        super().__init__()
        self._rows, self._share = rows, share

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch = self._rows.batch(index)
        return Batch(*(field[self._share.rows(len(field))] for field in batch))


class _Order(grain.transforms.DatasetSelectionMap):
    """Row i of the training stream -> (source, row of the source)."""

    def __init__(self, mixture: Mixture):
        self._mixture = mixture

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._mixture[index]


class _Batches(grain.MapDataset):
    """Item i is this process's share of the batch of step i."""

    def __init__(self, rows: grain.MapDataset, batches: Batches, share: Share):
        super().__init__()
        self._rows: Any = rows  # the dataset is endless, so no row is None
        self._batches, self._share = batches, share

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        first, chosen = self._batches.before(index), self._share.rows(self._batches.of(index))
        return stack([self._rows[first + i] for i in chosen])


def identity(prepared: Prepared, config: DataConfig, seed: int, batches: Batches) -> dict[str, Any]:
    """Everything the training stream depends on, except the step; and under "validation" digests of
    the validation sets. Saved in checkpoints.
    """
    trained = {name: source for name, source in config.sources.items() if source.weight > 0}
    mixed = {"mixture_version": mixture_lib.VERSION} if len(trained) > 1 else {}
    grown = {}
    if batches.doublings:
        length = batches.before(batches.warmup_steps) * config.context_length
        grown = {"batch_warmup": {"first": batches.of(0), "length": f"{length} tokens"}}
    return {
        **mixed,
        **grown,
        "seed": seed,
        "batch_size": batches.size,
        "context_length": config.context_length,
        "packing": config.packing,
        "packing_version": packing.VERSION,
        "tokenizer_sha256": prepared.tokenizer.sha256,
        "sources": {
            name: {
                "weight": source.weight,
                "tokens_sha256": prepared.stores[name]["train"].meta["tokens_sha256"],
            }
            for name, source in trained.items()
        },
        "validation": held_out(prepared, config),
    }


def held_out(prepared: Prepared, config: DataConfig) -> dict[str, str]:
    """Name of each validation set -> sha256 of its tokens."""
    return {
        name: prepared.stores[name]["valid"].meta["tokens_sha256"]
        for name, source in config.sources.items()
        if source.valid_fraction > 0
    }


def warn_changed(saved: Mapping[str, Any], held_out: Mapping[str, str]) -> None:
    """Warns if validation sets differ from those of the checkpoint with the identity `saved`."""
    for name, (old, new) in difference(saved.get("validation", {}), held_out).items():
        if old and new:
            log.warning(
                "the validation documents of data.sources.%s changed since the checkpoint (tokens "
                "sha256 %.12s, now %.12s): its losses before and after are not of the same text",
                name,
                old,
                new,
            )


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to continue a stream of batches with a different one. Warns if validation sets
    changed, because losses before and after are then of different texts.

    Raises:
      UserError: the rows, or their order, differ.
    """
    warn_changed(saved, current.get("validation", {}))
    trained = [{k: v for k, v in x.items() if k != "validation"} for x in (saved, current)]
    differing = difference(*trained)
    # Versions come last: another order of rows is reported only if nothing else differs.
    for key in sorted(differing, key=lambda key: key.endswith("_version")):
        old, new = differing[key]
        if key.endswith("_version"):
            raise UserError(
                f"rows come in another order than in the version that wrote the checkpoint ({key} "
                f"was {old or 1}, is {new}); go on with that version, or start a new workdir: "
                "init_from takes the weights over"
            )
        raise UserError(
            f"data of the checkpoint and of this run differ: {key} was {old}, is {new}; "
            "restore the old value or start a new workdir"
        )


def validation_rows(
    prepared: Prepared, config: DataConfig, max_tokens: int
) -> dict[str, ValidationRows]:
    """Held-out rows of every source that has any, at most `max_tokens` per source but at least one
    row."""
    sets = {}
    for source_id, (name, source) in enumerate(config.sources.items()):
        if source.valid_fraction == 0:
            continue
        store = prepared.stores[name]["valid"]
        plan = packing.concat(store.lengths, config.context_length, np.arange(store.num_documents))
        num_rows = len(plan.row_ptr) - 1
        num_chosen = min(num_rows, max(1, max_tokens // config.context_length))
        chosen = np.arange(num_chosen) * num_rows // num_chosen
        sets[name] = ValidationRows(store, plan, chosen, config.context_length, source_id)
    return sets


@dataclasses.dataclass(frozen=True, eq=False)
class ValidationRows(Sequence[Batch]):
    """Rows of a plan, made when they are read; their fields are [T]."""

    store: Store
    plan: Plan
    rows: np.ndarray  # in file order; evenly spread if only some are read
    context_length: int
    source_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.rows[index]
        return window(self.store, self.plan, row, self.context_length, self.source_id)

    def documents(self, index: int) -> np.ndarray:
        """For each place [T] the document of the store that it belongs to, -1 for padding."""
        pieces = slice(*self.plan.row_ptr[self.rows[index] : self.rows[index] + 2])
        found = np.repeat(self.plan.doc[pieces], self.plan.length[pieces])
        return np.pad(found, (0, self.context_length - len(found)), constant_values=-1)
