"""`koala doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from koala_local import console

if TYPE_CHECKING:
    from koala_local.models.doctor import Report


@click.command(short_help="Look for what is misconfigured, and measure.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for a bug report; nothing personal is in it.")
def doctor(as_json: bool) -> int:
    """Versions, backends, GPUs and memory, a two-second measurement, and what is amiss with the command that mends it.

    The exit status is 1 only when llama.cpp does not work at all.
    """
    from koala_local.models.doctor import examine

    report = examine()
    if as_json:
        console.json_line({**asdict(report), "gpus": [gpu._asdict() for gpu in report.gpus]})
    else:
        console.out(_page(report))
    return console.Exit.ERROR if any(finding.broken for finding in report.findings) else console.Exit.OK


def _page(report: Report) -> str:
    from koala_local.models.page import section
    from koala_local.wording import size

    gpus = [(gpu.name, f"{gpu.description}, {size(gpu.free)} of {size(gpu.total)} free") for gpu in report.gpus]
    machine = [
        ("system", report.system),
        ("CPU", f"{report.cpu}, {report.cores} cores"),
        ("instructions", " ".join(report.cpu_features) or "unknown"),
        ("RAM", _memory(report.ram_available, report.ram_total)),
        ("backends", ", ".join(report.backends) or "none"),
        *(gpus or [("GPUs", "none that llama.cpp uses")]),
    ]
    folders = []
    for name, folder in report.folders.items():
        free = f", {size(folder.free)} free" if folder.free is not None else ""
        folders.append((name, f"{folder.path}{free}{'' if folder.writable else ', cannot be written to'}"))
    parts = [
        section("versions", [(name, found or "not installed") for name, found in report.versions.items()]),
        section("machine", machine),
        section("folders", folders),
    ]
    if report.speed:
        speed, rows = report.speed, [("threads", str(report.speed.threads))]
        rows += [("prefill", f"{speed.prefill:.0f} tokens/s"), ("decode", f"{speed.decode:.0f} tokens/s")]
        parts.append(section("the bundled model", rows))
    found = []
    for number, part in enumerate(report.findings, 1):
        found += [console.folded(part.what, f"{number}. ", "   "), console.folded(part.remedy, "   ", "   ")]
    return "\n\n".join([*parts, "\n".join(["findings", *found]) if found else "Nothing is amiss."])


def _memory(available: int | None, total: int | None) -> str:
    from koala_local.wording import size

    return "unknown" if available is None or total is None else f"{size(available)} of {size(total)} free"
