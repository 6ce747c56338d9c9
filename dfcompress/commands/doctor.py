"""`dfcompress doctor`."""

from __future__ import annotations

import click

from dfcompress import console
from dfcompress.commands import _help, _options


@click.command(cls=_help.Command, epilog=_options.example("dfcompress doctor"))
@_options.reporting
def doctor(as_json: bool) -> None:
    """Show the properties of this machine: GPU, compilers, precision, apex, versions."""
    from dfcompress.verbs.doctor import doctor

    found = doctor()
    if as_json:
        console.result_json(found.to_json())
        return
    gpus = ", ".join(f"{gpu['name']} (compute capability {gpu['capability']})" for gpu in found.gpus)
    rows = [
        ["processor", f"{found.processor}, {found.cores} cores"],
        ["GPU", gpus or "none"],
        ["auto means", f"{found.device}, {found.precision}"],
        ["torch.compile", "works" if found.compiles else "does not work"],
        ["C++ compiler", found.compiler or "none"],
        ["apex", f"{found.apex['state']}: {found.apex['found']}"],
        *([name, version or "not installed"] for name, version in found.versions.items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.result(f"{name:<{width}}  {value}")
    for line in found.advice:
        console.result(line)
