"""The report for a terminal: one line a dataset, the fullest buckets, and the problems with what to do, on one screen."""

from __future__ import annotations

from simpletuner.console import Console
from simpletuner.data.doctor.examine import counts_of
from simpletuner.data.doctor.findings import Beside, Examined, Problem, Report, named, percent
from simpletuner.data.window import ALWAYS

BAR_CELLS = 24
BUCKET_LINES = 12
"""Of all datasets together."""
PROBLEMS_SHOWN = 15
FILES_SHOWN = 3
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
COLUMNS = ("dataset", "images", "skipped", "buckets", "batches", "draws", "cut", "enlarged", "alike", "captions", "latents")
BESIDE_COLUMNS = ("goes along", "kind", "with", "files", "in use", "without picture", "pictures without", "all black")
REMARKS_SHOWN = 10


def show(report: Report, console: Console) -> None:
    """Print the report."""
    console.heading(f"Datasets of {report.source}")
    console.table(COLUMNS, [row_of(one) for one in report.datasets])
    if report.conditioning:
        console.say()
        console.table(BESIDE_COLUMNS, [beside_row(one) for one in report.conditioning])
    console.say()
    console.facts(facts_of(report))
    show_buckets(report, console)
    show_problems(report, console)
    show_remarks(report, console)
    console.say(f"\n{verdict(report)}", style="bold")


def row_of(one: Examined) -> tuple[str, ...]:
    """One dataset in the table."""
    name = f"{one.id} (eval)" if one.dataset.is_eval else one.id
    if one.error is not None:
        return (name, "unusable", *("-" for _ in COLUMNS[2:]))
    counts, figures = counts_of(one), one.figures
    copies = [counts.get("exact duplicate", 0), counts.get("near duplicate", 0)]
    words = sum(counts.get(kind, 0) for kind in ("empty caption", "long caption"))
    return (
        name,
        f"{counts['images']:,}",
        f"{counts['skipped']:,}",
        f"{len(one.buckets):,}",
        "-" if one.dataset.is_eval else f"{figures['batches']:,.0f}",
        "-" if one.dataset.is_eval else percent(figures["share_of_draws"]),
        percent(figures["cropped_share"]),
        f"{counts.get('enlarged', 0) + counts.get('slightly enlarged', 0):,}",
        f"{copies[0]:,} + {copies[1]:,}" if any(copies) else "0",
        f"{words:,} bad" if words else "fine",
        size_of(figures["latent_cache_bytes"]),
    )


def beside_row(one: Beside) -> tuple[str, ...]:
    """One conditioning dataset in its table."""
    about = (one.id, one.conditioning.kind, ", ".join(one.conditioning.sources))
    if one.error is not None:
        return (*about, "unusable", *("-" for _ in BESIDE_COLUMNS[4:]))
    black = f"{len(one.black):,}" if one.conditioning.is_mask else "-"
    used = len({pair.file for pair in one.pairs})
    return (*about, f"{one.files:,}", f"{used:,}", f"{len(one.without_picture):,}", f"{one.count_lacking:,}", black)


def facts_of(report: Report) -> dict[str, str]:
    """The run in a few lines."""
    totals = report.totals
    windowed = [one for one in report.datasets if one.dataset.window != ALWAYS and one.figures]
    first = ", the first one" if windowed else ""
    batches = f"{totals['batches_per_epoch']:,.0f} batches{first}"
    parts = [f"{one.id} in {one.dataset.window}: {named(int(one.figures['batches_of_run']), 'batch', 'batches')}" for one in windowed]
    facts = {
        "epoch": f"{totals['steps_per_epoch']:,.10g} steps of {named(int(totals['images_per_step']), 'image')} ({batches})",
        "run": "; ".join([f"{totals['steps']:,.0f} steps", *parts]),
        "caches": f"about {size_of(totals['cache_bytes'])}: latents {size_of(totals['latent_cache_bytes'])}, "
        f"text {size_of(totals['text_cache_bytes'])}",
    }
    return facts | ({"estimated": "; ".join(report.assumed)} if report.assumed else {})


def show_buckets(report: Report, console: Console) -> None:
    """Print the fullest buckets as bars."""
    usable = [one for one in report.datasets if one.buckets]
    if not usable:
        return
    lines = max(1, BUCKET_LINES // len(usable))
    for one in usable[:BUCKET_LINES]:
        console.heading(f"Buckets of {one.id}")
        most = one.buckets[0].images
        for row in one.buckets[:lines]:
            partial = f", the last of {row.last_batch}" if row.last_batch else ""
            filled = "█" * max(1, round(row.images / most * BAR_CELLS))
            console.say(f"  {row.size!s:>11} {filled:<{BAR_CELLS}} {named(row.images, 'image')}, {named(row.batches, 'batch', 'batches')}{partial}")
        if len(one.buckets) > lines:
            rest = sum(row.images for row in one.buckets[lines:])
            console.say(f"  and {len(one.buckets) - lines} more with {named(rest, 'image')}", style="dim")


def show_problems(report: Report, console: Console) -> None:
    """Print the weightiest problems, each with what to do."""
    if not report.problems:
        return
    console.heading("Problems, the weightiest first")
    for problem in report.problems[:PROBLEMS_SHOWN]:
        console.say(f"  {problem.severity}: {problem.dataset}: {problem.message}{examples(problem)}", style=STYLES[problem.severity])
        console.say(f"    {problem.hint}")
    if len(report.problems) > PROBLEMS_SHOWN:
        console.say(f"  and {len(report.problems) - PROBLEMS_SHOWN} more; --json and --html list all", style="dim")


def examples(problem: Problem) -> str:
    """The first files of a problem, unless its message has named the only one."""
    if len(problem.files) == 1 and problem.files[0] in problem.message:
        return ""
    named_by, separator = (problem.examples, "; ") if problem.examples else (problem.files, ", ")
    more = f"{separator}..." if len(named_by) > FILES_SHOWN else ""
    return f" ({separator.join(named_by[:FILES_SHOWN])}{more})" if named_by else ""


def show_remarks(report: Report, console: Console) -> None:
    """Print what discovery said besides what is among the problems: what could not be fetched, what is converted."""
    remarks = [note for one in report.datasets for note in one.notes if not any(f" skipped, {rule}: " in note for rule in one.skipped)]
    remarks += [note for one in report.conditioning for note in one.notes]
    if not remarks:
        return
    console.heading("Remarks")
    for remark in remarks[:REMARKS_SHOWN]:
        console.say(f"  {remark}", style="dim")
    if len(remarks) > REMARKS_SHOWN:
        console.say(f"  and {len(remarks) - REMARKS_SHOWN} more; --json and --html list all", style="dim")


def verdict(report: Report) -> str:
    """The answer in a sentence."""
    counts = {severity: sum(problem.severity == severity for problem in report.problems) for severity in ("error", "warning", "note")}
    said = [named(count, severity) for severity, count in counts.items() if count]
    if not report.is_usable:
        return f"Not usable as it is: {', '.join(said)}."
    return f"Usable; {', '.join(said)}." if said else "Usable; nothing to complain of."


def size_of(count: float) -> str:
    """Say a number of bytes in three digits: 950 B, 5.5 MB."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
