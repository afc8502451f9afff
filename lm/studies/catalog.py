"""What exists: ops, their forms and where each is preferred, the mixers that call them, states, and
what has been shown of each form on which device.

Proofs are files of kernels/proofs, one per device, written by the contract suite:
`pytest tests/kernels --proof=FILE`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kernels import dispatch
from kernels.primitives import device
from lm import build as build_lib
from lm import families
from lm.build import Build
from lm.config import UserError, from_mapping
from lm.families import MIXERS
from lm.params import is_info

UNPROVEN = "unproven"


class FormRow(NamedTuple):
    """`preferred`: the targets where `auto` tries the form, with its rank, and the devices on which
    it is known to win. `proof`: counts, device and commit.
    """

    op: str
    form: str
    preferred: str
    mixers: str
    state: str
    proof: str


class MixerRow(NamedTuple):
    """`parameters` of the layer without feed-forward; `state` of one row in bytes after T tokens;
    forward FLOPs of its ops at the context length.
    """

    mixer: str
    ops: str
    parameters: int
    state: str
    op_flops_per_token: float


class MemberRow(NamedTuple):
    """A file that a key of the configuration may name, and its options with their defaults."""

    kind: str
    member: str
    options: str


def members() -> list[MemberRow]:
    """A row for every member of every family, including those of installed packages."""
    return [
        MemberRow(
            family.noun,
            name,
            "; ".join(f"{key} = {value}" for key, value in family.describe(name, name).items()),
        )
        for family in families.ALL
        for name in family.names()
    ]


def forms(mixers: list[MixerRow], proofs: Sequence[Mapping[str, Any]]) -> list[FormRow]:
    """A row for every op and form."""
    rows = []
    for name in dispatch.names():
        op = dispatch.get(name)
        users = ", ".join(row.mixer for row in mixers if name in row.ops.split(", "))
        fields = ", ".join(f"{field} [{letters}]" for field, letters in op.state.fields)
        for form in op.forms:
            preferred = [
                f"{target} {1 + [choice for choice, _ in choices].index(form)}"
                for target, choices in op.prefer.items()
                if form in [choice for choice, _ in choices]
            ]
            rows.append(
                FormRow(
                    name,
                    form,
                    ", ".join(preferred + dispatch.wins(name, form)),
                    users,
                    f"{op.state.growth}: {fields}",
                    _proof(f"{name}/{form}", proofs),
                )
            )
    return rows


def mixers(base: Mapping[str, Any]) -> list[MixerRow]:
    """A row for every mixer with its defaults, in a model of one layer of this configuration.

    Raises:
      UserError: `base` is not a configuration of a run.
    """
    from_mapping(copy.deepcopy(dict(base)))
    return [_mixer(name, base) for name in MIXERS.names()]


def read_proofs(folder: Path) -> list[dict[str, Any]]:
    """The files of kernels/proofs.

    Raises:
      UserError: a damaged file.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); write it again") from None
    return found


def _proof(key: str, proofs: Sequence[Mapping[str, Any]]) -> str:
    """The outcomes of a form on every device that has run the suite."""
    lines = []
    for proof in proofs:
        counts = proof["forms"].get(key)
        if counts:
            counted = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
            place = proof["cpu"] if proof["device"] == "cpu" else proof["device"]
            # On a CPU an interpreter evaluates the kernel of another device.
            is_kernel = key.split("/")[1] in device.TARGETS
            how = "interpreted on" if is_kernel and proof["device"] == "cpu" else "on"
            lines.append(f"{counted} {how} {place} at {proof['commit'][:10]}")
    return "; ".join(lines) or UNPROVEN


def _mixer(name: str, base: Mapping[str, Any]) -> MixerRow:
    values: Any = copy.deepcopy(dict(base))
    values["model"] |= {"pattern": name, "layers": {}, "num_layers": 1}
    values["mesh"]["data"] = 1
    built = build_lib.build(from_mapping(values), jax.devices()[:1])
    block = built.model.groups[0].blocks[0]
    infos = built.infos["groups_0"]["blocks_0"]["mixer"]
    calls = block.mixer.calls().values()
    length = built.config.data.context_length
    forward = sum(
        dispatch.flops(call.op, {**call.dims, "B": 1, "T": length}, call.options) for call in calls
    )
    size = sum(math.prod(info.shape) for info in jax.tree.leaves(infos, is_leaf=is_info))
    return MixerRow(
        mixer=name,
        ops=", ".join(dict.fromkeys(call.op for call in calls)),
        parameters=size,
        state=_state(built),
        op_flops_per_token=forward / length,
    )


def _state(built: Build) -> str:
    """Bytes of one row's state: the fixed part, and the part per token."""

    def size(length: int) -> int:
        state = jax.eval_shape(lambda: built.model.groups[0].blocks[0].mixer.init_state(1, length))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))

    each = size(2) - size(1)
    fixed = size(1) - each
    return " + ".join(part for part in (f"{fixed:,}", f"{each:,} T" if each else "") if part)
