"""A student that is a shallower teacher begins with the teacher's own layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dfcompress.models.classifier import Classifier

Tree = dict[str, "Tree"]


def inherited(student: Classifier, teacher: Classifier) -> dict[str, Tensor] | None:
    """The teacher's tensors under the student's names, None where the student is no shallower form of the teacher.

    It is where every one of its tensors has a counterpart of the same name and shape. Of a longer row of blocks, which
    are numbered, the first, the last and evenly spread ones between them are taken: residual networks lose little where
    single blocks are left out (Veit et al. 2016).
    """
    own, given = student.network.state_dict(), teacher.network.state_dict()
    partners = dict(_partners(_tree(own), _tree(given)))
    found = {name: given[partners[name]] for name in own if name in partners}
    if len(own) >= len(given) or any(name not in found or found[name].shape != own[name].shape for name in own):
        return None
    return found


def _tree(names: Iterable[str]) -> Tree:
    root: Tree = {}
    for name in names:
        branch = root
        for part in name.split("."):
            branch = branch.setdefault(part, {})
    return root


def _partners(own: Tree, given: Tree) -> Iterable[tuple[str, str]]:
    """The counterpart of every name, where there is one."""
    matched = {part: part for part in own if part in given}
    if own and all(part.isdecimal() for part in (*own, *given)):
        blocks, longer = sorted(own, key=int), sorted(given, key=int)
        last = max(1, len(blocks) - 1)
        matched = {block: longer[round(place * (len(longer) - 1) / last)] for place, block in enumerate(blocks)}
    for part, partner in matched.items():
        if not own[part]:
            yield part, partner
        for inner, theirs in _partners(own[part], given[partner]):
            yield f"{part}.{inner}", f"{partner}.{theirs}"
