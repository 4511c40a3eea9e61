"""The user's LyCORIS file, read once and typed: what is adapted, by which algorithm, with which numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError, nearest
from simpletuner.relaxed_json import load_relaxed

DEFAULT_PATH = Path("config/lycoris_config.json")
DEFAULT_TARGETS = ("Attention", "FeedForward")
FULL_DIMENSION = 10000
"""A `linear_dim` that is larger than any layer: LoKr then keeps both factors whole."""

KINDS: dict[str, type] = {
    **dict.fromkeys(("linear_dim", "conv_dim", "factor", "block_size", "tlora_min_rank"), int),
    **dict.fromkeys(("linear_alpha", "conv_alpha", "dropout", "rank_dropout", "module_dropout", "constraint", "tlora_alpha"), float),
    **dict.fromkeys(("full_matrix", "decompose_both", "bypass_mode", "weight_decompose", "rs_lora"), bool),
    **dict.fromkeys(("use_tucker", "rank_dropout_scale", "rescaled"), bool),
}
"""Settings of an algorithm, and what they hold."""
SPELLINGS = {
    "dim": "linear_dim",
    "alpha": "linear_alpha",
    "dora_wd": "weight_decompose",
    "use_cp": "use_tucker",
    "use_conv_cp": "use_tucker",
    "constrain": "constraint",
}
WITHOUT_EFFECT = frozenset({"preset", "train_on_input", "warn_on_unmatched", "train_llm_adapter", "mask_group_id"})
"""Keys of the library that mean nothing to the algorithms here."""
REFUSED: dict[str, tuple[object, str]] = {
    "use_scalar": (True, "its scalar has no place in the file, so a run could not be continued exactly"),
    "unbalanced_factorization": (True, "the library cannot load such a file back"),
    "use_data_init": (False, "the library cannot load such a file back"),
    "wd_on_output": (False, "the library cannot load such a file back"),
    "wd_on_out": (False, "the library cannot load such a file back"),
    "train_norm": (True, "norm layers are not adapted here"),
    "disable_conv_cp": (False, "write use_tucker: true instead"),
}
"""Keys of the library, the value that cannot be honoured, and why."""
PRESET_KINDS: dict[str, type] = {
    **dict.fromkeys(("target_module", "target_name", "exclude_name"), list),
    **dict.fromkeys(("module_algo_map", "name_algo_map"), dict),
    **dict.fromkeys(("enable_conv", "use_fnmatch"), bool),
}
PRESET_WITHOUT_EFFECT = frozenset({"unet_target_module", "unet_target_name", "text_encoder_target_module", "text_encoder_target_name"})

SIZES = frozenset({"linear_dim", "linear_alpha", "conv_dim", "conv_alpha", "use_tucker", "rs_lora"})
DROPOUTS = frozenset({"dropout", "rank_dropout", "module_dropout", "rank_dropout_scale"})
RANKS = frozenset({"tlora_min_rank", "tlora_alpha"})
"""How T-LoRA's ranks follow the time: how few there are in pure noise, and the power of their fall."""
ONE_FOR_ALL = frozenset({"conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout"}) | RANKS
"""Settings that the library takes for the whole network only."""
LOW_RANK = SIZES | DROPOUTS | {"bypass_mode", "weight_decompose"}
ALGORITHMS: dict[str, frozenset[str]] = {
    "lokr": LOW_RANK | {"factor", "full_matrix", "decompose_both"},
    "lora": LOW_RANK,
    "locon": LOW_RANK,
    "loha": LOW_RANK,
    "glora": SIZES | DROPOUTS | {"bypass_mode"},
    "diag-oft": DROPOUTS | {"linear_dim", "constraint", "rescaled"},
    "full": frozenset({"module_dropout"}),
    "ia3": frozenset({"module_dropout"}),
    "dylora": frozenset({"linear_dim", "linear_alpha", "module_dropout", "block_size"}),
    "tlora": RANKS | {"linear_dim", "linear_alpha", "dropout", "module_dropout"},
    "boft": DROPOUTS | {"linear_dim", "constraint", "rescaled"},
}
"""Algorithms, and the settings that each heeds. Those that heed bypass_mode have a factored form."""
FOLDED = ("lokr", "loha")
"""Algorithms whose scale alpha / dim the library applies once in a forward pass but twice when it merges. Their files are
saved with a scale of 1, folded into a factor, so that both ways give the trained numbers."""
DYLORA_BLOCK = 4
"""Ranks that DyLoRA trains at a time, where `block_size` is not given."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a module is adapted: an algorithm and its settings, complete."""

    algo: str
    settings: Mapping[str, Any]

    @property
    def is_factored(self) -> bool:
        """Whether the base's output and the adapter's are added, so that the adapted weight is never built."""
        return bool(self.settings["bypass_mode"])


@dataclass(frozen=True, slots=True)
class LycorisFile:
    """The file's content, checked, with what it leaves out filled in."""

    source: str
    """Where it came from, for messages."""
    recipe: Recipe
    """For every target without its own."""
    modules: tuple[str, ...] = ()
    """Class names as the user wrote them. Nothing here or below means DEFAULT_TARGETS, as far as the denoiser has them."""
    names: tuple[str, ...] = ()
    """Patterns of module names."""
    module_recipes: Mapping[str, Recipe] = field(default_factory=dict)
    name_recipes: Mapping[str, Recipe] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    enable_conv: bool = True
    use_fnmatch: bool = False
    notes: tuple[str, ...] = ()
    """Settings that have no effect."""

    @property
    def ranks_in_noise(self) -> int:
        """Ranks that T-LoRA has in pure noise."""
        return int(self._of_ranks("tlora_min_rank", 1))

    @property
    def rank_power(self) -> float:
        """Power by which T-LoRA's ranks fall."""
        return float(self._of_ranks("tlora_alpha", 1.0))

    def _of_ranks(self, key: str, usual: float) -> Any:
        recipes = (self.recipe, *self.module_recipes.values(), *self.name_recipes.values())
        return next((recipe.settings[key] for recipe in recipes if key in recipe.settings), usual)

    @property
    def names_targets(self) -> bool:
        """Whether the file says what to adapt."""
        return bool(self.modules or self.names or self.module_recipes or self.name_recipes)


def read_lycoris(path: str | Path | None) -> LycorisFile:
    """Read the file, or the default one; without either, LoKr of factor 16 on attention and feed-forward.

    Raises:
        ConfigError: every problem at once.
    """
    if path is None and not DEFAULT_PATH.is_file():
        return parse({"algo": "lokr", "linear_dim": FULL_DIMENSION, "linear_alpha": 1, "factor": 16}, "the built-in default")
    place = DEFAULT_PATH if path is None else Path(path)
    if not place.is_file():
        raise ConfigError(f"lycoris_config {place} does not exist", hint="Correct the path, or leave lycoris_config out for a default.")
    return parse(load_relaxed(place), str(place))


def parse(content: object, source: str) -> LycorisFile:
    """Check the content of a file; `source` says where it came from."""
    if not isinstance(content, dict):
        raise ConfigError(f"{source} holds {_said(content)}, not an object", hint='It begins with {"algo": "lokr", ...')
    reader = _Reader()
    keys = {key: value for key, value in content.items() if not key.startswith("_")}
    preset = reader.preset(keys.pop("apply_preset", {}))
    multiplier = reader.value("multiplier", keys.pop("multiplier", 1.0), float)
    if multiplier not in (None, 1.0):
        reader.problems.append(f"multiplier: {multiplier:g}; it must be 1, because the saved file does not carry it. Scale with linear_alpha.")
    read = LycorisFile(
        source=source,
        recipe=reader.recipe(keys, ""),
        modules=tuple(preset["target_module"]),
        names=tuple(preset["target_name"]),
        module_recipes={name: reader.recipe({**keys, **own}, f"module_algo_map.{name}.", own) for name, own in preset["module_algo_map"].items()},
        name_recipes={name: reader.recipe({**keys, **own}, f"name_algo_map.{name}.", own) for name, own in preset["name_algo_map"].items()},
        excluded=tuple(preset["exclude_name"]),
        enable_conv=preset.get("enable_conv", True),
        use_fnmatch=preset.get("use_fnmatch", False),
        notes=tuple(dict.fromkeys(reader.notes)),
    )
    if reader.problems:
        raise ConfigError(f"{source} cannot be used:\n" + "\n".join(f"  {problem}" for problem in dict.fromkeys(reader.problems)))
    return read


def saved_config(file: LycorisFile, modules: Mapping[str, Recipe]) -> dict[str, Any]:
    """Give the settings as they are in effect, in the file's own form, to stand beside saved weights.

    Args:
        file: as read.
        modules: the denoiser's own class names and how each is adapted.
    """
    preset: dict[str, Any] = {
        "target_module": list(modules),
        "target_name": list(file.names),
        "module_algo_map": {name: _saved(recipe) for name, recipe in modules.items() if recipe is not file.recipe},
        "name_algo_map": {name: _saved(recipe) for name, recipe in file.name_recipes.items()},
        "exclude_name": list(file.excluded),
        "enable_conv": file.enable_conv,
        "use_fnmatch": file.use_fnmatch,
    }
    return {"multiplier": 1.0, **_saved(file.recipe), "apply_preset": {key: value for key, value in preset.items() if value != [] and value != {}}}


def _saved(recipe: Recipe) -> dict[str, Any]:
    """A recipe for weights into which the scale alpha / dim was folded, where it was: the scale that is left is 1."""
    settings = {"algo": recipe.algo, **recipe.settings}
    if recipe.algo in FOLDED and settings["linear_dim"] < FULL_DIMENSION:
        settings |= {"linear_alpha": float(settings["linear_dim"]), "rs_lora": False}
        if "conv_alpha" in settings:
            settings["conv_alpha"] = float(settings.get("conv_dim", settings["linear_dim"]))
    return settings


class _Reader:
    """Reads parts of a file and collects what is wrong, so that all of it is said at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def value(self, key: str, value: object, kind: type) -> Any:
        """A value as the type it should have, or None and a problem; numbers and truths may be quoted."""
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                number = float("nan")
            if number == number and (kind is float or number.is_integer()):
                return kind(number)
        if kind in (list, dict) and isinstance(value, kind):
            return value
        said = {int: "a whole number", float: "a number", bool: "true or false", list: "a list of names", dict: "an object"}[kind]
        self.problems.append(f"{key}: {_said(value)}; it must be {said}")
        return None

    def recipe(self, keys: Mapping[str, Any], where: str, own: Mapping[str, Any] | None = None) -> Recipe:
        """The settings for one kind of target; `own` are those that it does not share with the rest."""
        algo = str(keys.get("algo", "lora")).lower()
        if algo not in ALGORITHMS:
            self.problems.append(f"{where}algo: {algo!r} is unknown{_meant(algo, ALGORITHMS)}; known are {', '.join(ALGORITHMS)}")
        heeded = ALGORITHMS.get(algo, frozenset(KINDS))
        settings: dict[str, Any] = {}
        for key, value in keys.items():
            name = SPELLINGS.get(key, key)
            if key == "algo" or value is None:
                continue
            if name in KINDS:
                settings[name] = self.value(where + key, value, KINDS[name])
                if name not in heeded and (own is None or key in own):
                    self.notes.append(f"{where}{key} has no effect with algo {algo}")
                if own is not None and key in own and name in ONE_FOR_ALL:
                    self.problems.append(f"{where}{key}: it holds for all targets alike; move it to the top of the file")
            elif key == "sig_type":
                if value != "principal":
                    self.problems.append(f"{where}sig_type: {_said(value)}; it must be 'principal': the library cannot load another back")
            elif key in WITHOUT_EFFECT:
                self.notes.append(f"{where}{key} has no effect")
            elif key in REFUSED:
                value_refused, reason = REFUSED[key]
                if self.value(where + key, value, bool) is value_refused:
                    self.problems.append(f"{where}{key}: {str(value_refused).lower()} is not supported: {reason}")
            else:
                known = {"algo", *KINDS, *SPELLINGS, "apply_preset", "multiplier"}
                self.problems.append(f"{where}{key}: unknown{_meant(key, known)}")
        return self._complete(algo, {name: value for name, value in settings.items() if name in heeded}, where)

    def _complete(self, algo: str, given: dict[str, Any], where: str) -> Recipe:
        """Fill in what was left out and check what was said."""
        dim = given.get("linear_dim") or (FULL_DIMENSION if algo == "lokr" else 16)
        settings = {"linear_dim": dim, "linear_alpha": float(dim), **given}
        for key in ("linear_dim", "linear_alpha", "conv_dim", "conv_alpha"):
            if settings.get(key) is not None and settings[key] <= 0:
                self.problems.append(f"{where}{key}: {settings[key]:g}; it must be more than 0")
        if algo != "lokr" and dim >= FULL_DIMENSION:
            self.problems.append(f"{where}linear_dim: {dim} means the full dimension with algo lokr alone; with {algo} usual values are 4 to 64")
        for key in ("dropout", "rank_dropout", "module_dropout"):
            if not 0 <= (settings.get(key) or 0) < 1:
                self.problems.append(f"{where}{key}: {settings[key]:g}; it must be at least 0 and less than 1")
        if settings.get("factor") is not None and settings["factor"] != -1 and settings["factor"] < 1:
            self.problems.append(f"{where}factor: {settings['factor']}; it must be a whole number from 1, or -1 for as square as possible")
        heeds = ALGORITHMS.get(algo, frozenset())
        is_dora = bool(settings.get("weight_decompose"))
        if is_dora and settings.get("bypass_mode"):
            self.problems.append(f"{where}bypass_mode: true leaves weight_decompose without effect; choose one of them")
        if algo == "tlora":
            settings = {"tlora_min_rank": 1, "tlora_alpha": 1.0, **settings}
            if settings["tlora_min_rank"] is not None and not 1 <= settings["tlora_min_rank"] <= dim:
                self.problems.append(f"{where}tlora_min_rank: {settings['tlora_min_rank']}; it must be from 1 to linear_dim {dim}")
            if settings["tlora_alpha"] is not None and settings["tlora_alpha"] <= 0:
                self.problems.append(f"{where}tlora_alpha: {settings['tlora_alpha']:g}; it must be more than 0")
        if algo == "dylora" and dim % (settings.get("block_size") or DYLORA_BLOCK):
            block = settings.get("block_size") or DYLORA_BLOCK
            self.problems.append(f"{where}linear_dim: {dim}; with algo dylora it must be a multiple of block_size {block}")
        if "bypass_mode" not in settings or is_dora:
            settings["bypass_mode"] = algo == "tlora" or ("bypass_mode" in heeds and not is_dora)
        if algo == "lokr" and settings["bypass_mode"] and settings.get("rank_dropout"):
            self.notes.append(f"{where}rank_dropout has no effect on LoKr in its factored form")
        return Recipe(algo, settings)

    def preset(self, content: object) -> dict[str, Any]:
        """The targets; both maps are always there."""
        read: dict[str, Any] = {}
        for key, value in (self.value("apply_preset", content, dict) or {}).items():
            if key.startswith("_"):
                continue
            if key in PRESET_WITHOUT_EFFECT:
                self.notes.append(f"apply_preset.{key} has no effect; use {key.split('_', 1)[1].removeprefix('encoder_')}")
            elif key == "lora_prefix":
                if value != "lycoris":
                    self.problems.append(f"apply_preset.lora_prefix: {_said(value)}; only 'lycoris' can be loaded back")
            elif key not in PRESET_KINDS:
                self.problems.append(f"apply_preset.{key}: unknown{_meant(key, PRESET_KINDS)}")
            elif (typed := self.value(f"apply_preset.{key}", value, PRESET_KINDS[key])) is not None:
                read[key] = typed
        for name in ("target_module", "target_name", "exclude_name"):
            read[name] = [item for item in read.get(name, []) if self._is_name(f"apply_preset.{name}", item)]
        for name in ("module_algo_map", "name_algo_map"):
            entries = read.get(name, {}).items()
            read[name] = {key: own for key, own in ((key, self.value(f"{name}.{key}", value, dict)) for key, value in entries) if own is not None}
        return read

    def _is_name(self, key: str, item: object) -> bool:
        if not isinstance(item, str):
            self.problems.append(f"{key}: {_said(item)}; it must be a list of names")
        return isinstance(item, str)


def _said(value: object) -> str:
    return "nothing" if value is None else repr(value)


def _meant(name: str, known: Any) -> str:
    best = nearest(name, known)
    return f"; did you mean {best!r}?" if best else ""
