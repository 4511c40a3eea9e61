"""`simpletuner cache`: what the caches hold, whether it is whole, what can go, and a copy for other tools."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.cli.commands.train import NAMED, add_place, read_options
from simpletuner.cli.locate import Place, find_config
from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from simpletuner.console import Console
    from simpletuner.data.cache_place import CachePlace
    from simpletuner.data.plan import DataPlan
    from simpletuner.memory.weight_shelf import Shelf
    from simpletuner.options.train_config import TrainConfig

    Config = tuple[TrainConfig, dict[str, str]]
    """Options, and the values of `{name}` in its datasets' file."""

help = "list caches, check them, clear them out, export them"
example = "simpletuner cache gc --config config/config.json --dry-run"

SWITCHES = ("json", "delete", "dry-run", "older-than", "also", "each", "debug")
SERVERS = ("https://", "http://")
DAMAGED = 3
DAY_SECONDS = 86400.0
FOREIGN = (
    "none of its {count:,} entries is one that this config uses on this machine, so none is dropped. Another resolution, device or precision"
    " has entries of its own: train first, or delete the folder to be rid of them all."
)
EPILOG = """\
actions:
  ls [FOLDER ...]       each cache at or below these folders, or of a config: what it holds, made by what, last used when
  verify [FOLDER ...]   read every entry, list the damaged ones and count the lost ones; exit code 3 if there are any
  gc                    drop what no dataset or base of the config uses, and rewrite files of which little is left
  gc FOLDER ...         the same in these folders of the config alone; without a config, by --older-than alone
  export FOLDER TO      copy a cache to plain safetensors files and an index.json

The action comes first; folders and flags follow in any order.
A cache in a bucket is named as ls shows it, s3://bucket/folder, and has to be one of the config's, which knows how to get in.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "verify", "gc", "export"), help="what to do, see below")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="cache folders; by default those of the config")
    add_place(parser)
    parser.add_argument("--json", action="store_true", help="print JSON and not a table (ls, verify, gc)")
    parser.add_argument("--delete", action="store_true", help="verify: drop the damaged entries, and files that lost some; a run makes them again")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="gc: say what would be done")
    parser.add_argument("--older-than", "--older_than", metavar="DAYS", type=float, help="gc: only what lies in files not read for so many days")
    parser.add_argument("--also", metavar="PATH", action="append", default=[], help="gc: another config, whose entries stay too; may be repeated")
    parser.add_argument("--each", action="store_true", help="export: one file an entry")
    parser.set_defaults(flags=[])
    parser.epilog = EPILOG + "\nOptions of config.json may be given as flags: --cache_dir elsewhere."


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.flags import read_flags
    from simpletuner.console import Console

    args.folders, words = take_folders(args.folders, args.flags)
    flags, own = read_flags(words, NAMED, SWITCHES)
    asked = {"config": args.config, "example": args.example, "env": args.env, **own}
    console = Console(stream=sys.stderr if args.json else sys.stdout)

    def config() -> Config:
        return read(find_config(asked["config"], asked["example"], asked["env"], os.environ), flags)

    if args.action == "export":
        return export(args, config, console)
    if args.action == "gc":
        has_config = any(asked.values()) or not args.folders or any(map(is_bucket, args.folders))  # only a config knows how to get into a bucket
        return collect(args, config() if has_config else None, [read(find_config(path, None, None, {}), flags) for path in args.also], console)
    folders, shelves = find_caches(args.folders, config)
    if args.action == "ls":
        return show(folders, shelves, args, console)
    words = [f"--{name}={value}" for name, value in [*asked.items(), *((one.key, one.value) for one in flags)] if value]
    return verify(folders, shelves, args, console, words)


def take_folders(folders: Sequence[str], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell apart folders and options of config.json, which argparse does not know: it leaves all that stands behind such an option.

    Args:
        folders: those that argparse has found.
        words: what it left.

    Returns:
        All folders, `s3://bucket/folder at http://server` as one of them; and the options, `--key=value` each.
    """
    from simpletuner.options.sources import read_words

    settings, rest = read_words(words)
    found: list[str] = []
    waiting = [*folders, *(word for word in rest if not word.startswith("-"))]
    while waiting:
        name = waiting.pop(0)
        if is_bucket(name) and len(waiting) > 1 and waiting[0] == "at" and waiting[1].startswith(SERVERS):
            name = f"{name} at {waiting[1]}"
            del waiting[:2]
        found.append(name)
    return found, [*(f"--{one.key}={one.value}" for one in settings), *(word for word in rest if word.startswith("-"))]


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


def find_caches(named: Sequence[str], config: Callable[[], Config]) -> tuple[list[CachePlace], list[Shelf]]:
    """Every cache at or below the folders named, or of the config, and every quantised base.

    Raises:
        ConfigError: a folder is not there, or there are no caches.
    """
    from simpletuner.data.cache_place import BucketPlace, LocalPlace
    from simpletuner.data.cache_tools import cache_folders
    from simpletuner.memory.weight_shelf import find_shelves

    buckets = named_buckets(named, config)
    roots = [Path(name) for name in named if not is_bucket(name)]
    if missing := [str(folder) for folder in roots if not folder.is_dir()]:
        raise ConfigError(
            f"there is no folder {', '.join(missing)}", hint="Name cache folders or a folder above them, or none for those of the config."
        )
    if not named:
        options, variables = config()
        places = plan_of(options, variables).cache_places
        roots = [Path(options.data.cache_dir), *(place.folder for place in places if isinstance(place, LocalPlace))]
        buckets = [place for place in places if isinstance(place, BucketPlace)]
    found: list[CachePlace] = [*map(LocalPlace, cache_folders(roots)), *(place for place in buckets if has_shards(place))]
    shelves = find_shelves(roots)
    if not found and not shelves:
        raise ConfigError(
            f"there are no caches in {', '.join(dict.fromkeys([*map(str, roots), *map(name_of, buckets)]))}",
            hint="A run makes them; --config or a FOLDER says where to look.",
        )
    return found, shelves


def is_bucket(name: str) -> bool:
    return name.startswith("s3://")


def named_buckets(named: Iterable[str], config: Callable[[], Config]) -> list[CachePlace]:
    """Those of the names that mean buckets, which the config has to know.

    Raises:
        ConfigError: it does not.
    """
    wanted = [name for name in named if is_bucket(name)]
    if not wanted:
        return []
    places = [place for place in plan_of(*config()).cache_places if is_bucket(str(place))]
    known = {name_of(place): place for place in places}
    known_here = {**known, **{str(place): place for place in places}}
    if unknown := [name for name in wanted if name.rstrip("/") not in known_here]:
        raise ConfigError(f"{', '.join(unknown)} is no cache of this config", hint=f"Its caches in buckets: {', '.join(known) or 'none'}.")
    return [known_here[name.rstrip("/")] for name in wanted]


def name_of(place: CachePlace) -> str:
    """What a place is called on a command line: one word for a bucket, whose server the config knows."""
    from simpletuner.data.cache_place import BucketPlace

    has_server = isinstance(place, BucketPlace) and place.options.aws_endpoint_url
    return str(place).rsplit(" at ", 1)[0] if has_server else str(place)


def has_shards(place: CachePlace) -> bool:
    from simpletuner.data.cache_tools import is_shard

    return any(map(is_shard, place.shelf().list()))


def show(folders: Sequence[CachePlace], shelves: Sequence[Shelf], args: argparse.Namespace, console: Console) -> int:
    from simpletuner.cli import cached_weights
    from simpletuner.cli.cache_words import day, kind_of, made_by
    from simpletuner.data.cache_tools import survey
    from simpletuner.data.doctor.table import size_of

    held = [row for folder in folders for row in survey(folder)]
    if args.json:
        rows = [
            {"folder": name_of(row.place), "about": dict(row.about), "entries": row.entries, "bytes": row.bytes, "last_used": row.used}
            for row in held
        ]
        print(json.dumps(rows + cached_weights.rows(shelves), indent=1))
        return 0
    table = [[name_of(row.place), kind_of(row.about), made_by(row.about), f"{row.entries:,}", size_of(row.bytes), day(row.used)] for row in held]
    for one in shelves:
        made_of = cached_weights.made_of(one.about)
        table.append([str(one.folder), cached_weights.KIND, made_of, f"{one.layers:,}", size_of(one.bytes), day(one.used)])
    console.table(["folder", "kind", "made by", "entries", "size", "last used"], table)
    return 0


def verify(folders: Sequence[CachePlace], shelves: Sequence[Shelf], args: argparse.Namespace, console: Console, words: Sequence[str] = ()) -> int:
    """
    Args:
        words: flags that name the config, for the command that is suggested.
    """
    from simpletuner.cli.cache_words import tell
    from simpletuner.cli.cached_weights import verified
    from simpletuner.data.cache_loss import lost_entries
    from simpletuner.data.cache_tools import check, rewrite, take_stock
    from simpletuner.data.store import Store

    report: list[dict[str, Any]] = []
    for folder in folders:
        name, stock = name_of(folder), take_stock(folder)
        with console.bar(f"verify {name}", len(stock.rows), "entries") as bar:
            damaged, faults = check(folder, stock, bar.advance)
        lost = lost_entries(folder, stock)
        if args.delete and damaged:
            Store(folder).drop([one.place for one in damaged])
        if args.delete and lost:
            rewrite(folder, take_stock(folder), list(lost), lambda count: None)
        entries = [{"key": one.key, "file": one.place.shard, "problem": one.problem, "about": dict(one.about)} for one in damaged]
        report.append(
            {"folder": name, "entries": int(stock.is_current.sum()), "damaged": entries, "lost": lost, "files": faults, "deleted": args.delete}
        )
    report += verified(shelves, console, args.delete)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for found in report:
            tell(found, console, words)
    return DAMAGED if any(found["damaged"] or found["lost"] for found in report) else 0


def export(args: argparse.Namespace, config: Callable[[], Config], console: Console) -> int:
    from simpletuner.cli.cache_words import total_lost
    from simpletuner.data.cache_export import export as write
    from simpletuner.data.cache_loss import lost_entries
    from simpletuner.data.cache_place import LocalPlace
    from simpletuner.data.cache_tools import take_stock

    if len(args.folders) != 2:
        raise ConfigError("export takes a cache folder and a folder to write to", hint="simpletuner cache export cache/vae/auraflow/my-cat exported")
    [folder], to = named_buckets(args.folders[:1], config) or [LocalPlace(Path(args.folders[0]))], Path(args.folders[1])
    stock = take_stock(folder)
    lost = lost_entries(folder, stock)
    if not len(stock.rows) and not lost:
        raise ConfigError(f"there is no cache in {name_of(folder)}", hint="`simpletuner cache ls FOLDER` lists those below a folder.")
    with console.bar("export", int(stock.is_current.sum()), "entries") as bar:
        damaged = write(folder, to, stock, bar.advance, is_one_file_each=args.each)
    for one in damaged:
        console.warn(f"entry {one.key} is left out: {one.problem}")
    if lost:
        console.warn(f"{', '.join(lost)}: damaged, entries lost: {total_lost(lost)}")
    console.say(f"{int(stock.is_current.sum()) - len(damaged):,} entries are in {to}; index.json there says what is where")
    return DAMAGED if damaged or lost else 0


def collect(args: argparse.Namespace, config: Config | None, also: Sequence[Config], console: Console) -> int:
    from simpletuner.cli.cached_weights import collected, roots_of
    from simpletuner.data.cache_tools import find_unused, take_stock, to_rewrite
    from simpletuner.data.doctor.table import size_of
    from simpletuner.data.store import Store

    roots = roots_of(args.folders, config[0] if config else None)
    named = [name for name in args.folders if Path(name) not in roots]
    folders = asked_of(named, config) if named or not args.folders else []
    before = None if args.older_than is None else time.time() - args.older_than * DAY_SECONDS
    if before is not None and (buckets := [name_of(place) for place in folders if not place.shelf().notes_use]):
        raise ConfigError(f"--older-than: nobody notes when {', '.join(buckets)} was last read", hint="Leave it out, or name the folders to clear.")
    used = used_by([config, *also], console) if config and folders else {}
    report: list[dict[str, Any]] = []
    for folder in folders:
        if not args.dry_run:
            store = Store(folder)
            store.sweep()
            store.close()
        stock = take_stock(folder)
        unused = find_unused(stock, used.get(folder.identity, set()) if config else None, before)
        if unused.is_foreign:
            console.warn(f"{name_of(folder)}: {FOREIGN.format(count=unused.kept)}")
        names = to_rewrite(stock, unused.places)
        freed = unused.bytes if args.dry_run else clear(folder, unused.places, names, console)
        report.append({"folder": name_of(folder), "kept": unused.kept, "dropped": len(unused.places), "files": len(names), "bytes": freed})
    report += collected(roots, (lambda: weights_used_by([config, *also])) if config else None, before, console, is_dry=args.dry_run)
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    rows = [[row["folder"], f"{row['kept']:,}", f"{row['dropped']:,}", str(row["files"]), size_of(max(0, row["bytes"]))] for row in report]
    console.table(["folder", "kept", "would drop" if args.dry_run else "dropped", "files rewritten", "freed"], rows)
    return 0


def clear(folder: CachePlace, places: Sequence[Any], names: Sequence[str], console: Console) -> int:
    """Drop entries, rewrite files, and give the bytes that were freed."""
    from simpletuner.data.cache_tools import rewrite, take_stock
    from simpletuner.data.store import Store

    Store(folder).drop(places)
    with console.bar(f"rewrite {name_of(folder)}", len(names), "files") as bar:
        return rewrite(folder, take_stock(folder), names, bar.advance)


def asked_of(named: Sequence[str], config: Config | None) -> list[CachePlace]:
    """The caches that `gc` may touch.

    Raises:
        ConfigError: one of those named is no cache, or not the config's.
    """
    from simpletuner.data.cache_place import LocalPlace

    places = plan_of(*config).cache_places if config else []
    known = {place.identity: place for place in places}
    asked: list[CachePlace] = []
    for name in named:
        place = named_buckets([name], lambda: config)[0] if is_bucket(name) and config else LocalPlace(Path(name))
        if not has_shards(place):
            raise ConfigError(f"{name_of(place)} is no cache folder", hint="`simpletuner cache ls FOLDER` lists those below a folder.")
        if config and place.identity not in known:
            raise ConfigError(
                f"{place} is no cache folder of this config",
                hint=f"Its folders: {', '.join(sorted(map(name_of, known.values())))}. If no config uses {place} any more, delete the folder; or, "
                f"without --config, `{shlex.join(['simpletuner', 'cache', 'gc', str(place), '--older-than', '30'])}` drops what no run has read for "
                "30 days.",
            )
        asked.append(place)
    return asked or [place for place in places if has_shards(place)]


def used_by(configs: Sequence[Config], console: Console) -> dict[str, set[str]]:
    """The keys that runs of any of these configs use, by identity of the place."""
    from simpletuner.training.quiet import quiet_libraries

    quiet_libraries()
    from simpletuner.training.cache_use import used_keys

    used: dict[str, set[str]] = {}
    for config in configs:
        for identity, keys in used_keys(*config, console).items():
            used.setdefault(identity, set()).update(keys)
    return used


def weights_used_by(configs: Sequence[Config]) -> list[Path | None]:
    """Where runs of these configs keep their quantised bases."""
    from simpletuner.training.quiet import quiet_libraries

    quiet_libraries()
    from simpletuner.training.cache_use import used_weights

    return [used_weights(config) for config, _ in configs]
