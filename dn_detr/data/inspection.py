"""Checks sets as training does, and shows what is wrong with them and what is in them."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dn_detr.data.categories import DatasetError, class_mapping, unusual_categories
from dn_detr.data.check import DatasetReport, examine_coco
from dn_detr.data.findings import Finding, only
from dn_detr.data.images import open_images
from dn_detr.data.summary import class_rows, summarize, totals

__all__ = ["CocoSet", "inspect_sets"]


@dataclass(frozen=True)
class CocoSet:
    """A set to look at.

    Attributes:
        json: a COCO-format annotation file.
        images: the folder that its file names are relative to.
        strict: see ``check_coco``.
        num_classes: number of classes of the model; None: one a category.
    """

    json: str
    images: str
    strict: bool = False
    num_classes: int | None = None


def inspect_sets(
    sets: Sequence[CocoSet],
    open_all: bool = False,
    workers: int = 0,
    output: str | None = None,
    shown: int | None = None,
) -> bool:
    """Checks sets and prints every fault and a summary of each.

    Args:
        sets: the first is the one to train on; the others must have its categories.
        open_all: open and decode every image.
        workers: number of processes that open images; 0: this one.
        output: a folder for ``NAME_findings.json`` (every fault), ``NAME_summary.txt`` (every
            class) and ``NAME.png`` (pictures); None: nothing is written.
        shown: number of culprits printed of each fault; None: all.

    Returns:
        Whether all sets can be used for training and evaluation.
    """
    good, first = True, None
    names = _distinct([os.path.splitext(os.path.basename(s.json))[0] for s in sets])
    for name, coco_set in zip(names, sets):
        try:
            report = examine_coco(coco_set.json, coco_set.images, coco_set.strict)
        except DatasetError as error:
            print(f"{coco_set.json}\n  ERROR {error}\n", flush=True)
            good = False
            continue
        findings = report.findings + _about_classes(report, coco_set, first)
        if open_all:
            findings += open_images(report.images, coco_set.images, workers)
        first = first or report
        good = good and not only(findings, "error")
        _print(report, findings, shown)
        if output is not None:
            _write(report, findings, os.path.join(os.path.expanduser(output), name))
    return good


def _distinct(names: list[str]) -> list[str]:
    return [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names, start=1)]


def _about_classes(
    report: DatasetReport, coco_set: CocoSet, first: DatasetReport | None
) -> list[Finding]:
    categories = report.categories
    if not categories:
        return []
    findings = []
    try:
        class_mapping(categories, coco_set.num_classes, report.path)
        unusual = unusual_categories(categories, coco_set.num_classes)
        findings += [unusual] if unusual else []
    except DatasetError as error:
        findings.append(Finding(str(error)))
    if first and first.categories and categories != first.categories:
        findings.append(
            Finding(
                f"the categories are not those of {first.path}: both files need the same, id and "
                f"name. Only here: {_only(categories, first.categories)}; only there",
                [_only(first.categories, categories)],
            )
        )
    used = {annotation["category_id"] for annotation in report.annotations}
    unused = [f"id {c['id']} {c['name']!r}" for c in categories if c["id"] not in used]
    return findings + ([Finding("classes without a box", unused, "note")] if unused else [])


def _only(mine: list[dict], others: list[dict]) -> str:
    return ", ".join(f"{c['id']} {c['name']!r}" for c in mine if c not in others) or "none"


def _print(report: DatasetReport, findings: list[Finding], shown: int | None) -> None:
    print(report.path)
    for finding in sorted(findings, key=lambda f: ("error", "warning", "note").index(f.level)):
        number = f" ({len(finding.culprits):,})" if finding.culprits else ""
        print(f"  {finding.level.upper():<8}{finding.text}{number}")
        for culprit in finding.culprits[:shown]:
            print(f"            {culprit}")
        left = len(finding.culprits) - len(finding.culprits[:shown])
        if left:
            print(f"            ... {left:,} more (--all prints them, --output DIR writes them)")
    if not findings:
        print("  no fault")
    summary = summarize(report)
    print(f"{totals(summary)}\n{class_rows(summary)}\n", flush=True)


def _write(report: DatasetReport, findings: list[Finding], stem: str) -> None:
    from dn_detr.data.plots import plot_summary  # matplotlib takes its time

    os.makedirs(os.path.dirname(stem), exist_ok=True)
    summary = summarize(report)
    with open(f"{stem}_findings.json", "w", encoding="utf-8") as file:
        content = {"file": report.path, "findings": [asdict(f) for f in findings]}
        json.dump(content, file, indent=1)
    with open(f"{stem}_summary.txt", "w", encoding="utf-8") as file:
        file.write(f"{report.path}\n{totals(summary)}\n{class_rows(summary, len(summary.names))}\n")
    written = [f"{stem}_findings.json", f"{stem}_summary.txt"]
    if report.images:
        plot_summary(summary, report.path, f"{stem}.png")
        written.append(f"{stem}.png")
    print("written: " + ", ".join(written) + "\n", flush=True)
