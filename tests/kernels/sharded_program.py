"""Ops over 8 devices give the results of one device. test_shard runs this in its own process."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from kernels import contract, dispatch, shard
from kernels.contract import Case
from kernels.primitives import device
from kernels.shard import Placement
from tests.kernels.contract_problem import error

RULES = {"B": ("data", "fsdp"), "H": ("tensor",), "G": ("tensor",)}
DIMS = {"B": 4, "T": 40, "H": 4, "G": 2, "K": 8, "V": 8, "N": 3, "W": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"alibi": True, "window": 17},
    "stickbreaking": {"remainder": "bias"},
}
OF_FORM: dict[tuple[str, str], dict[str, Any]] = {
    ("softmax", "pallas_tpu"): {"window": 17}
}  # splash attention has no ALiBi


def check(name: str, form: str, mesh: Mesh, carried: bool) -> None:
    """Output, state and gradients equal those of one device, and no undeclared collective
    is sent.
    """
    op, options = dispatch.get(name), OF_FORM.get((name, form), OPTIONS.get(name, {}))
    needed = op.needed({**op.options, **options}).values()
    # The gradient of an input that all rows share is a sum over the devices that hold the rows.
    has_shared_input = any("B" not in s.letters.split() for s in needed if s.kind != "constant")
    case = Case(DIMS, options, "none" if carried else "packed", carried)
    problem = contract.sample(op, case)

    def run(problem: contract.Problem, mesh: Mesh | None) -> tuple[jax.Array, object]:
        def loss(inputs: dict[str, jax.Array]) -> tuple[jax.Array, object]:
            out, state = dispatch.apply(
                name,
                inputs,
                segment_ids=problem.segment_ids,
                state=problem.state,
                form=form,
                options=options,
                placement=None if mesh is None else Placement(mesh, RULES, "auto", "contiguous"),
            )
            return jnp.sum(jnp.sin(out)), (out, state)

        return jax.grad(loss, has_aux=True)(problem.inputs)

    layout = {
        spec.name: jax.NamedSharding(mesh, shard.spec(spec.letters, RULES))
        for spec in op.inputs
        if spec.name in problem.inputs
    }
    placed = {key: jax.device_put(x, layout[key]) for key, x in problem.inputs.items()}
    many = jax.jit(lambda p: run(p, mesh)).lower(problem._replace(inputs=placed)).compile()
    got = many(problem._replace(inputs=placed))
    want = jax.jit(lambda p: run(p, None))(problem)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        found = error(x, y)
        assert found <= op.tolerances[form, "float32"].value, f"{name} {form} {found}"
    if not has_shared_input and not carried:
        text = many.as_text()
        assert text is not None
        assert "all-reduce(" not in text, f"{name} {form} sums over devices"


def main(everything: bool) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    assert mesh.size == 8
    for name in dispatch.names():
        for form in dispatch.get(name).forms if everything else ("chunked",):
            for carried in (False, True) if everything else (name == "softmax",):
                with device.interpreted():
                    check(name, form, mesh, carried)
                print(name, form)


if __name__ == "__main__":
    main(everything=sys.argv[1:] == ["everything"])
