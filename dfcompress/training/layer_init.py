"""A student of a teacher's form, or of a shallower one, begins with the teacher's own layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dfcompress.models.classifier import Classifier, load_tensors

Tree = dict[str, "Tree"]


def init_from_teacher(student: Classifier, teacher: Classifier, outputs: Tensor | None = None) -> bool:
    """Give the student the teacher's tensors, where it has the teacher's form or a shallower one; whether it has.

    It has where every one of its tensors has a counterpart of the same name and shape. Where `outputs` are given, they
    are the student's for each of the teacher's classes in its last layer, and its others stay as they are; without them
    both know the same classes, and a whole copy of the teacher would be no student. Of a longer row of blocks, which
    are numbered, the first, the last and evenly spread ones between them are taken: residual networks lose little where
    single blocks are left out (Veit et al. 2016).
    """
    own, given = student.network.state_dict(), teacher.network.state_dict()
    partners = dict(_partners(_tree(own), _tree(given)))
    if len(own) > len(given) or (outputs is None and len(own) == len(given)):
        return False
    head, begun = list(own)[-1].rpartition(".")[0], {}
    for name, values in own.items():
        theirs = given.get(partners.get(name, ""))
        if theirs is None:
            return False
        theirs = theirs.to(values.device)
        of_head = name.rpartition(".")[0] == head
        if outputs is not None and of_head and theirs.shape == (len(outputs), *values.shape[1:]):
            theirs = values.index_copy(0, outputs, theirs)
        if theirs.shape != values.shape:
            return False
        begun[name] = theirs
    load_tensors(student.network, begun)
    return True


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
