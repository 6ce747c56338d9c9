"""Layer initialisation: a student with a teacher's architecture, or a shallower form of it, begins with its layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dfcompress.models.classifier import Classifier, load_tensors

Tree = dict[str, "Tree"]


def init_from_teacher(student: Classifier, teacher: Classifier, outputs: Tensor | None = None) -> bool:
    """Copy the teacher's tensors into a student of the teacher's form or of a shallower form; False, and no change, if
    the forms do not fit.

    The forms fit if every tensor of the student has a counterpart of the same name and shape. `outputs` `(classes,)`
    are the student's outputs for the teacher's classes: they select the rows of its last layer that are copied, and its
    other rows stay. Without `outputs` both networks have the same classes, and a student of the teacher's full depth is
    refused, because it would be a copy of the teacher. Where the teacher has more numbered blocks in a row, its first
    block, its last and evenly spaced blocks between them are copied: residual networks lose little accuracy without
    single blocks (Veit et al. 2016).
    """
    student_tensors, teacher_tensors = student.network.state_dict(), teacher.network.state_dict()
    partners = dict(_partners(_tree(student_tensors), _tree(teacher_tensors)))
    deeper = len(teacher_tensors) - len(student_tensors)
    if deeper < 0 or (outputs is None and deeper == 0):
        return False
    head, initial = list(student_tensors)[-1].rpartition(".")[0], {}
    for name, values in student_tensors.items():
        partner = teacher_tensors.get(partners.get(name, ""))
        if partner is None:
            return False
        partner = partner.to(values.device)
        of_head = name.rpartition(".")[0] == head
        if outputs is not None and of_head and partner.shape == (len(outputs), *values.shape[1:]):
            partner = values.index_copy(0, outputs, partner)
        if partner.shape != values.shape:
            return False
        initial[name] = partner
    load_tensors(student.network, initial)
    return True


def _tree(names: Iterable[str]) -> Tree:
    root: Tree = {}
    for name in names:
        branch = root
        for part in name.split("."):
            branch = branch.setdefault(part, {})
    return root


def _partners(student: Tree, teacher: Tree) -> Iterable[tuple[str, str]]:
    """Pairs of a name in the student and its counterpart in the teacher, for every name that has one."""
    matched = {part: part for part in student if part in teacher}
    if student and all(part.isdecimal() for part in (*student, *teacher)):
        blocks, longer = sorted(student, key=int), sorted(teacher, key=int)
        last = max(1, len(blocks) - 1)
        matched = {block: longer[round(place * (len(longer) - 1) / last)] for place, block in enumerate(blocks)}
    for part, partner in matched.items():
        if not student[part]:
            yield part, partner
        for inner, partner_inner in _partners(student[part], teacher[partner]):
            yield f"{part}.{inner}", f"{partner}.{partner_inner}"
