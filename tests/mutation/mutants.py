"""Mutants of a module: its source with one of cosmic-ray's operators applied in one place."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes:
        module: Name of the module in `spin_lightning`.
        line: Number of the first line that differs.
        before: That line as it is.
        after: The line as it was changed.
        source: The whole module, changed.
    """

    module: str
    line: int
    before: str
    after: str
    source: str = field(repr=False)

    @property
    def path(self) -> Path:
        return path_of(self.module)


def path_of(module: str) -> Path:
    return ROOT / "spin_lightning" / f"{module}.py"


def sample(modules: tuple[str, ...], count: int, seed: int) -> tuple[list[Mutant], int]:
    """Draw mutants at random from all there are of some modules; those, and how many places.

    Changes that Python cannot see (of annotations and docstrings) or cannot compile are no mutants,
    and two that come to the same program are one.
    """
    sources = {module: path_of(module).read_text(encoding="utf-8") for module in modules}
    places = [(m, *place) for m in modules for place in _places(sources[m])]
    random.Random(seed).shuffle(places)
    seen = {_meaning(source) for source in sources.values()}
    found: list[Mutant] = []
    for module, operator, occurrence in places:
        if len(found) == count:
            break
        mutated = _mutate(sources[module], operator, occurrence)
        meaning = None if mutated is None else _meaning(mutated)
        if mutated is None or meaning is None or meaning in seen:
            continue
        seen.add(meaning)
        found.append(_mutant(module, sources[module], mutated))
    return found, len(places)


def _operators() -> list[Any]:
    """cosmic-ray's own, but for the two that need to be told which variable they are for."""
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    return [provider[name]() for name in provider if not provider[name].arguments()]


def _places(source: str) -> Iterator[tuple[Any, int]]:
    """Every operator, with the numbers of the places where it applies."""
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes = list(ast_nodes(get_ast(source)))
    for operator in _operators():
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        yield from ((operator, occurrence) for occurrence in range(count))


def _mutate(source: str, operator: Any, occurrence: int) -> str | None:
    from cosmic_ray.mutating import mutate_code

    mutated: str | None = mutate_code(source, operator, occurrence)
    return mutated


def _meaning(source: str) -> str | None:
    """The program without what does not run: annotations and docstrings; None if it is none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = None  # type: ignore[assignment]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        documented = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _mutant(module: str, source: str, mutated: str) -> Mutant:
    lines, others = source.splitlines(), mutated.splitlines()
    changed = (i for i, pair in enumerate(zip(lines, others, strict=False)) if len(set(pair)) > 1)
    line = next(changed)
    return Mutant(module, line + 1, lines[line].strip(), others[line].strip(), mutated)
