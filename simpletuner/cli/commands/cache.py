"""`simpletuner cache`: what the caches hold, whether it is whole, what can go, and a copy for other tools."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.cli.commands.train import NAMED, add_place, read_options
from simpletuner.cli.locate import Place, find_config
from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from simpletuner.console import Console
    from simpletuner.data.plan import DataPlan
    from simpletuner.options.train_config import TrainConfig

    Config = tuple[TrainConfig, dict[str, str]]
    """Options, and the values of `{name}` in its datasets' file."""

help = "list caches, check them, clear them out, export them"
example = "simpletuner cache gc --config config/config.json --dry-run"

SWITCHES = ("json", "delete", "dry-run", "older-than", "also", "each", "debug")
DAMAGED = 3
DAY_SECONDS = 86400.0
FOREIGN = (
    "none of its {count:,} entries is one that this config uses on this machine, so none is dropped. Another resolution, device or precision"
    " has entries of its own: train first, or delete the folder to be rid of them all."
)
EPILOG = """\
actions:
  ls [FOLDER ...]       each cache folder at or below these, or of a config: what it holds, made by what, last used when
  verify [FOLDER ...]   read every entry and list the damaged ones; exit code 3 if there are any
  gc                    drop what no dataset of the config uses, and rewrite files of which little is left
  gc FOLDER ...         the same in these folders of the config alone; without a config, by --older-than alone
  export FOLDER TO      copy a cache to plain safetensors files and an index.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "verify", "gc", "export"), help="what to do, see below")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", type=Path, help="cache folders; by default those of the config")
    add_place(parser)
    parser.add_argument("--json", action="store_true", help="print JSON and not a table (ls, verify, gc)")
    parser.add_argument("--delete", action="store_true", help="verify: drop the damaged entries; the next run makes them again")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="gc: say what would be done")
    parser.add_argument("--older-than", "--older_than", metavar="DAYS", type=float, help="gc: only what lies in files not read for so many days")
    parser.add_argument("--also", metavar="PATH", action="append", default=[], help="gc: another config, whose entries stay too; may be repeated")
    parser.add_argument("--each", action="store_true", help="export: one file an entry")
    parser.set_defaults(flags=[])
    parser.epilog = EPILOG + "\nOptions of config.json may be given as flags: --cache_dir elsewhere."


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.flags import read_flags
    from simpletuner.console import Console

    flags, own = read_flags(args.flags, NAMED, SWITCHES)
    asked = {"config": args.config, "example": args.example, "env": args.env, **own}
    console = Console(stream=sys.stderr if args.json else sys.stdout)

    def config() -> Config:
        return read(find_config(asked["config"], asked["example"], asked["env"], os.environ), flags)

    if args.action == "export":
        return export(args, console)
    if args.action == "gc":
        has_config = any(asked.values()) or not args.folders
        return collect(args, config() if has_config else None, [read(find_config(path, None, None, {}), flags) for path in args.also], console)
    folders = find_folders(args.folders, config)
    return verify(folders, args, console) if args.action == "verify" else show(folders, args, console)


def read(place: Place, flags: Sequence[Any]) -> Config:
    """A config and the values of `{name}` in its datasets' file."""
    config = read_options(place, flags).config
    variables = {"model_family": config.models.model_family, "output_dir": str(config.training.output_dir)}
    return config, {**variables, "example": str(place.example)} if place.example else variables


def plan_of(config: TrainConfig, variables: dict[str, str]) -> DataPlan:
    """The datasets of a config, whether or not their images are there."""
    from simpletuner.data.plan import load_plan

    # Where caches are does not depend on what sizes are multiples of, which may be known to the hub alone.
    return load_plan(config.data.data_backend_config, config.data, variables, alignment_px=1, checks_places=False)


def folders_of(plan: DataPlan) -> list[Path]:
    """Where a plan's caches are."""
    return [*(dataset.cache_dir_vae for dataset in plan.datasets), plan.text_cache_dir]


def find_folders(named: Sequence[Path], config: Callable[[], Config]) -> list[Path]:
    """Every cache folder at or below those named, or of the config.

    Raises:
        ConfigError: a folder is not there, or there are no caches.
    """
    from simpletuner.data.cache_tools import cache_folders

    if missing := [str(folder) for folder in named if not folder.is_dir()]:
        raise ConfigError(
            f"there is no folder {', '.join(missing)}", hint="Name cache folders or a folder above them, or none for those of the config."
        )
    roots = list(named)
    if not roots:
        options, variables = config()
        roots = [Path(options.data.cache_dir), *folders_of(plan_of(options, variables))]
    folders = cache_folders(roots)
    if not folders:
        raise ConfigError(
            f"there are no caches in {', '.join(dict.fromkeys(map(str, roots)))}", hint="A run makes them; --config or a FOLDER says where to look."
        )
    return folders


def show(folders: Sequence[Path], args: argparse.Namespace, console: Console) -> int:
    from simpletuner.data.cache_tools import survey
    from simpletuner.data.doctor.table import size_of

    held = [row for folder in folders for row in survey(folder)]
    if args.json:
        rows = [
            {"folder": str(row.folder), "about": dict(row.about), "entries": row.entries, "bytes": row.bytes, "last_used": row.used} for row in held
        ]
        print(json.dumps(rows, indent=1))
        return 0
    console.table(
        ["folder", "kind", "made by", "entries", "size", "last used"],
        [[str(row.folder), row.about.get("kind", "-"), made_by(row.about), f"{row.entries:,}", size_of(row.bytes), day(row.used)] for row in held],
    )
    return 0


def made_by(about: Any) -> str:
    """The VAE or encoders that made an entry, by the first letters of their digest."""
    return " ".join(f"{name} {value[:8]}" for name, value in sorted(about.items()) if name != "kind") or "-"


def day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def verify(folders: Sequence[Path], args: argparse.Namespace, console: Console) -> int:
    from simpletuner.data.cache_tools import check, take_stock
    from simpletuner.data.store import Store

    report: list[dict[str, Any]] = []
    for folder in folders:
        stock = take_stock(folder)
        with console.bar(f"verify {folder}", len(stock.rows), "entries") as bar:
            damaged, faults = check(folder, stock, bar.advance)
        if args.delete and damaged:
            Store(folder).drop([one.place for one in damaged])
        entries = [{"key": one.key, "file": one.place.shard, "problem": one.problem, "about": dict(one.about)} for one in damaged]
        report.append({"folder": str(folder), "entries": int(stock.is_current.sum()), "damaged": entries, "files": faults, "deleted": args.delete})
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for found in report:
            tell(found, console)
    return DAMAGED if any(found["damaged"] for found in report) else 0


def tell(found: dict[str, Any], console: Console) -> None:
    """Print what `verify` found in one folder."""
    damaged, entries = found["damaged"], found["entries"]
    console.say(f"{found['folder']}: {entries:,} entries, " + (f"{len(damaged):,} damaged" if damaged else "all whole"))
    for one in damaged:
        what = one["about"].get("sample") or one["about"].get("prompt") or one["key"]
        console.say(f"  {what[:100]}: {one['problem']} ({one['file']}, {one['key'][:8]})")
    for file, fault in found["files"].items():
        console.say(f"  {file}: {fault}; no entry is lost, `simpletuner cache gc {found['folder']}` writes it anew")
    if damaged:
        console.say(
            "  dropped; the next run makes them again" if found["deleted"] else "  --delete drops them; a run makes each again when it needs it"
        )


def export(args: argparse.Namespace, console: Console) -> int:
    from simpletuner.data.cache_export import export as write
    from simpletuner.data.cache_tools import take_stock

    if len(args.folders) != 2:
        raise ConfigError("export takes a cache folder and a folder to write to", hint="simpletuner cache export cache/vae/auraflow/my-cat exported")
    folder, to = args.folders
    stock = take_stock(folder)
    if not len(stock.rows):
        raise ConfigError(f"there is no cache in {folder}", hint="`simpletuner cache ls FOLDER` lists those below a folder.")
    with console.bar("export", int(stock.is_current.sum()), "entries") as bar:
        damaged = write(folder, to, stock, bar.advance, is_one_file_each=args.each)
    for one in damaged:
        console.warn(f"entry {one.key} is left out: {one.problem}")
    console.say(f"{int(stock.is_current.sum()) - len(damaged):,} entries are in {to}; index.json there says what is where")
    return DAMAGED if damaged else 0


def collect(args: argparse.Namespace, config: Config | None, also: Sequence[Config], console: Console) -> int:
    from simpletuner.data.cache_tools import find_unused, take_stock, to_rewrite
    from simpletuner.data.doctor.table import size_of
    from simpletuner.data.store import Store

    folders = asked_of(args.folders, config)
    used = used_by([config, *also], console) if config else {}
    before = None if args.older_than is None else time.time() - args.older_than * DAY_SECONDS
    report: list[dict[str, Any]] = []
    for folder in folders:
        if not args.dry_run:
            Store(folder).sweep()
        stock = take_stock(folder)
        unused = find_unused(stock, used.get(folder.resolve(), set()) if config else None, before)
        if unused.is_foreign:
            console.warn(f"{folder}: {FOREIGN.format(count=unused.kept)}")
        names = to_rewrite(stock, unused.places)
        freed = unused.bytes if args.dry_run else clear(folder, unused.places, names, console)
        report.append({"folder": str(folder), "kept": unused.kept, "dropped": len(unused.places), "files": len(names), "bytes": freed})
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    rows = [[row["folder"], f"{row['kept']:,}", f"{row['dropped']:,}", str(row["files"]), size_of(max(0, row["bytes"]))] for row in report]
    console.table(["folder", "kept", "would drop" if args.dry_run else "dropped", "files rewritten", "freed"], rows)
    return 0


def clear(folder: Path, places: Sequence[Any], names: Sequence[str], console: Console) -> int:
    """Drop entries, rewrite files, and give the bytes that were freed."""
    from simpletuner.data.cache_tools import rewrite, take_stock
    from simpletuner.data.store import Store

    Store(folder).drop(places)
    with console.bar(f"rewrite {folder}", len(names), "files") as bar:
        return rewrite(folder, take_stock(folder), names, bar.advance)


def asked_of(named: Sequence[Path], config: Config | None) -> list[Path]:
    """The folders that `gc` may touch.

    Raises:
        ConfigError: one of those named is no cache folder, or not the config's.
    """
    from simpletuner.data.cache_tools import cache_folders, is_shard

    known = {folder.resolve(): folder for folder in folders_of(plan_of(*config))} if config else None
    for folder in named:
        if not folder.is_dir() or not any(is_shard(path.name) for path in folder.iterdir()):
            raise ConfigError(f"{folder} is no cache folder", hint="`simpletuner cache ls FOLDER` lists those below a folder.")
        if known is not None and folder.resolve() not in known:
            raise ConfigError(f"{folder} is no cache folder of this config", hint=f"Its folders: {', '.join(sorted(map(str, known.values())))}.")
    return list(named) or [folder for folder in (known or {}).values() if folder in cache_folders([folder])]


def used_by(configs: Sequence[Config], console: Console) -> dict[Path, set[str]]:
    """The keys that runs of any of these configs use, by folder."""
    from simpletuner.training.quiet import quiet_libraries

    quiet_libraries()
    from simpletuner.training.cache_use import used_keys

    used: dict[Path, set[str]] = {}
    for config in configs:
        for folder, keys in used_keys(*config, console).items():
            used.setdefault(folder, set()).update(keys)
    return used
