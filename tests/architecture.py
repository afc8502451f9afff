"""The shape of the code, read from its syntax trees: who imports whom, budgets, names.

Each check takes the root of a tree and yields one line for each violation.

Ranks: a module imports only modules of a strictly lower rank; files of one folder may import each
other without a cycle, except ops and mixers, which never do. Imports inside functions and under
TYPE_CHECKING count. There is no list of exceptions.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "lm", "launch", "experiments", "tests")

OP_RANKS = (
    {"reference"},
    {"tile"},
    {"chunked", "jax_nn", "pallas_tpu", "triton_gpu", "decode"},
    {"sequence"},
    {"cases"},
    {"__init__"},
)
OP_FILES = {"README.md"} | {
    f"{name}.py" for name in ("__init__", "reference", "tile", "chunked", "decode", "cases")
}
KERNEL_RANKS = (
    {"letters"},
    {"segments", "blocks", "contract", "measured", "spelling"},
    {"primitives", "oracle"},
    *({f"op.{name}" for name in names} for names in OP_RANKS),
    {"shard", "quarantine", "strategies"},
    {"dispatch"},
    {""},
)
LM_RANKS = (
    {"mapping"},
    {"files"},
    {"extras"},
    {"families", "data.growth"},
    {"data.config", "readers", "sections"},
    {"config"},
    {"params", "schedules", "laws", "data", "metrics", "state", "trackers"},
    {"targets", "mup", "fits"},
    {"optimizers", "parallel"},
    {"modules"},
    {"matrices"},
    {"mixers", "feed_forward"},
    {"blocks"},
    {"pattern"},
    {"layers"},
    {"model"},
    {"loss"},
    {"objectives"},
    {"step"},
    {"build"},
    {"run"},
    {"evaluation"},
    {"evals"},
    {"evaluation.evaluate"},
    {"quality", "interop"},
    {"starts"},
    {"plan", "report"},
    {"train"},
    {"studies"},
    {""},
)
KERNELS_FOR_LM = {
    *("dispatch", "letters", "contract", "segments", "primitives", "shard"),
    *("spelling", "strategies"),
}
KERNELS_FOR_LAUNCH = KERNELS_FOR_LM | {"blocks", "measured", "op.cases"}
KERNELS_THIRD_PARTY = {"jax", "numpy", "jaxtyping"}
TRITON = {"triton", "jax_triton", "tokamax"}
FILE_LINES, KERNEL_FILE_LINES, MAIN_LINES = 400, 600, 80
FUNCTION_LINES, KERNEL_LINES, RUN_LINES, PARAMETERS = 60, 150, 120, 8


class Module(NamedTuple):
    """A Python file: dotted name, path relative to the root, syntax tree, number of lines."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def package(self) -> str:
        return self.path.parts[0]


def modules(root: Path) -> list[Module]:
    found = []
    for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(name, relative, ast.parse(text), text.count("\n")))
    return found


def imports(module: Module, known: set[str]) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, with the line. `from a import b` gives a.b if that is a
    module, and else a.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = module.path.name == "__init__.py"
                parts = module.name.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), node.lineno


def group(name: str) -> str:
    """The name that the rank tables use for a module.

    For example lm.data.tokens -> data, kernels.softmax.tile -> op.tile, lm -> ''. A file that a
    table lists apart from its folder keeps its own name: lm.evaluation.evaluate ->
    evaluation.evaluate.
    """
    package, *rest = name.split(".")
    if not rest:
        return ""
    if package == "lm" and any((apart := ".".join(rest)) in names for names in LM_RANKS):
        return apart
    flat = set().union(*KERNEL_RANKS)
    if package != "kernels" or rest[0] in flat:
        return rest[0]
    return f"op.{rest[1] if len(rest) > 1 else '__init__'}"


def rank(name: str) -> int | None:
    table = {"kernels": KERNEL_RANKS, "lm": LM_RANKS}[name.split(".")[0]]
    return next((i for i, names in enumerate(table) if group(name) in names), None)


def folder(name: str) -> str:
    return ".".join(name.split(".")[:2])


def check_ranks(root: Path) -> Iterator[str]:
    files = modules(root)
    known = {m.name for m in files}
    inside: dict[str, set[str]] = {}
    for module in (m for m in files if m.package in ("kernels", "lm")):
        if rank(module.name) is None:
            yield f"{module.path}: {group(module.name)!r} has no rank"
            continue
        for target, line in imports(module, known):
            if target.split(".")[0] != module.package:
                continue
            a, b = group(module.name), group(target)
            if a == b and not a.startswith("op.") and a not in ("mixers", ""):
                inside.setdefault(module.name, set()).add(target)
            elif (
                a.startswith("op.")
                and b.startswith("op.")
                and folder(module.name) != folder(target)
            ):
                yield f"{module.path}:{line}: an op imports another op, {target}"
            elif (a == "op.reference" and b == "primitives") or (
                a != "op.reference" and b == "oracle"
            ):
                yield f"{module.path}:{line}: an oracle shares no code with {target}"
            elif (low := rank(target)) is None or low >= (rank(module.name) or 0):
                yield f"{module.path}:{line}: {a!r} imports {target}, which is not of a lower rank"
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        yield f"import cycle: {' -> '.join(error.args[1])}"


def check_borders(root: Path) -> Iterator[str]:
    """Imports between packages, and what kernels and experiments may take from outside."""
    files = modules(root)
    known = {m.name for m in files}
    ours = {
        "kernels": {"kernels"},
        "lm": {"lm", "kernels"},
        "launch": {"launch", "lm", "kernels"},
        "experiments": {"experiments"},
        "tests": set(PACKAGES),
    }
    foreign = {"kernels": KERNELS_THIRD_PARTY, "experiments": {"ml_collections"}}
    for module in files:
        for target, line in imports(module, known):
            top = target.split(".")[0]
            allowed = foreign.get(module.package)
            if module.path.name.startswith("triton_"):
                allowed = KERNELS_THIRD_PARTY | TRITON
            if top in PACKAGES:
                if top not in ours[module.package]:
                    yield f"{module.path}:{line}: {module.package} imports {target}"
                elif top == "kernels" and module.package in ("lm", "launch"):
                    legal = KERNELS_FOR_LM if module.package == "lm" else KERNELS_FOR_LAUNCH
                    if group(target) not in legal:
                        yield f"{module.path}:{line}: {module.package} may not see {target}"
            elif allowed is not None and top not in allowed | set(sys.stdlib_module_names):
                yield f"{module.path}:{line}: {module.package} imports {top}"


def check_budgets(root: Path) -> Iterator[str]:
    for module in modules(root):
        is_kernel_file = module.path.name.startswith(("pallas_", "triton_"))
        limit = KERNEL_FILE_LINES if is_kernel_file else FILE_LINES
        if module.package == "launch" and len(module.path.parts) == 2 and is_main(module.tree):
            limit = MAIN_LINES
        if module.lines > limit:
            yield f"{module.path}: {module.lines} lines, budget {limit}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from check_function(module, node)


def check_function(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    is_kernel = module.package == "kernels" and node.name.endswith("_kernel")
    limit = KERNEL_LINES if is_kernel else FUNCTION_LINES
    if module.name == "lm.train" and node.name == "run":
        limit = RUN_LINES
    lines = (node.end_lineno or 0) - node.lineno + 1
    if lines > limit:
        yield f"{module.path}:{node.lineno}: {node.name} has {lines} lines, budget {limit}"
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    count = len([name for name in names if name not in ("self", "cls")])
    if count > PARAMETERS and not is_kernel:  # the Refs of a kernel follow from its specs
        where = f"{module.path}:{node.lineno}: {node.name}"
        yield f"{where} has {count} parameters, budget {PARAMETERS}"


def is_main(tree: ast.Module) -> bool:
    return any(isinstance(n, ast.If) and "__main__" in ast.dump(n.test) for n in tree.body)


def check_module_level_arrays(root: Path) -> Iterator[str]:
    """jnp, lax and jax.random calls that run on import: they would start a device."""
    for module in modules(root):
        aliases = {"jax.numpy", "jax.lax", "jax.random"}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                aliases |= {
                    a.asname or a.name for a in node.names if f"{prefix}{a.name}" in aliases
                }
        for call in calls_at_import(module.tree):
            head = ast.unparse(call.func).rpartition(".")[0]
            if head in aliases:
                yield f"{module.path}:{call.lineno}: {ast.unparse(call.func)} runs at import"


def calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        parts: list[ast.AST] = [*defaults, *getattr(node, "decorator_list", [])]
    else:
        parts = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            yield node
    for part in parts:
        yield from calls_at_import(part)


def check_names(root: Path) -> Iterator[str]:
    """No place is called utils. The name of an op or mixer is a string only where one is chosen.

    Names that are also values of a configuration key ("linear") are allowed everywhere, because the
    two uses look the same.
    """
    values = key_values(root)
    ops, mixers = op_names(root), mixer_names(root) - values
    for module in modules(root):
        words = {word for part in module.path.with_suffix("").parts for word in part.split("_")}
        if found := words & {"util", "utils", "helpers", "misc"}:
            yield f"{module.path}: named {found.pop()}; name a file by what it defines"
        place = module.path.as_posix()
        if re.match(r"tests/|experiments/|lm/interop|launch/benchmarks/", place):
            continue
        forbidden = ops | mixers
        if place.startswith("lm/mixers/"):  # a mixer names its op, and itself
            forbidden = mixers - ops - {module.path.stem}
        elif place.startswith("lm/modules/"):  # parts of mixers around an op
            forbidden = mixers - ops
        elif module.package == "kernels":
            forbidden = forbidden - {module.path.parts[1]}
        for text, line in strings(module.tree):
            if found := forbidden & {word.strip() for word in text.split(",")}:
                yield f"{module.path}:{line}: spells {sorted(found)[0]!r}"


def key_values(root: Path) -> set[str]:
    """The words in lm's Literal types: values of configuration keys and of members' options."""
    literals = [
        node
        for module in modules(root)
        if module.package == "lm"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"
    ]
    return {text for node in literals for text, _ in strings(node)}


def strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """String literals that are not docstrings, with their lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skip = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            yield node.value, node.lineno


def op_names(root: Path) -> set[str]:
    folders = (p for p in (root / "kernels").glob("*/") if list(p.glob("*.py")))
    return {p.name for p in folders} - {"measured", "primitives"}


def mixer_names(root: Path) -> set[str]:
    return {p.stem for p in (root / "lm" / "mixers").glob("*.py")} - {"__init__"}


def check_files(root: Path) -> Iterator[str]:
    for op in sorted(op_names(root)):
        missing = OP_FILES - {p.name for p in (root / "kernels" / op).iterdir()}
        yield from (f"kernels/{op}: {name} is missing" for name in sorted(missing))
    for mixer in sorted(mixer_names(root)):
        test = root / "tests" / "lm" / "mixers" / f"test_{mixer}.py"
        if not test.exists():
            yield f"lm/mixers/{mixer}.py: {test.relative_to(root)} is missing"


CHECKS = [check_ranks, check_borders, check_budgets, check_module_level_arrays]
CHECKS += [check_names, check_files]
