"""Whether an adapter's tensors fit the layers that their names mean: the names of two models, or of two sizes of one, may be the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from simpletuner.adapters.changes import Parts, algorithm_of, change_shape, is_by_inputs
from simpletuner.adapters.key_maps import Layout, Names
from simpletuner.errors import ConfigError


def check_fit(file: Path, groups: Mapping[str, Parts], names: Names, layout: Layout, model: str, made_for: str | None) -> None:
    """Refuse tensors of other shapes than the model's layers have.

    Args:
        groups: the file's tensors by the names of layers in it.
        model: what to call the denoiser.
        made_for: what the file says that it is for.

    Raises:
        ConfigError: names the file, the first layer's keys and shapes, and counts the others.
    """
    wrong = {name: said for name, parts in groups.items() if (said := _misfit(parts, _shape_of(names[name], layout)))}
    if not wrong:
        return
    name, said = next(iter(sorted(wrong.items())))
    layers = names[name]
    shapes = ", ".join(f"{name}.{part} {list(value.shape)}" for part, value in sorted(groups[name].items()))
    raise ConfigError(
        f"{file} is for another base than {model}: {said}. In the file: {shapes}. "
        f"In the model: {' and '.join(layers)}, {list(_shape_of(layers, layout))}"
        + (f". In all, {len(wrong)} layers do not fit" if len(wrong) > 1 else "")
        + (f". The file says that it is for {made_for}" if made_for else ""),
        hint="Use the base that the adapter was made for; models of one family come in several sizes.",
    )


def _shape_of(layers: Sequence[str], layout: Layout) -> tuple[int, ...]:
    """Of the weight that layers have together, one above the other."""
    return (sum(layout.rows(tuple(layers))), *layout.shapes[layers[0]][1:])


def _misfit(parts: Parts, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the shapes of a layer's tensors; None if nothing is."""
    outputs, inputs = shape[0], math.prod(shape[1:])
    try:
        rows, columns = change_shape(parts, shape)
    except KeyError as error:
        return f"{error.args[0]} is missing"
    except (RuntimeError, ValueError, IndexError):
        return "tensors of a layer do not fit each other or the layer"
    except ConfigError:
        return "a layer has no tensors of a known kind"
    if (rows, columns) != (outputs, inputs):
        return f"the change is of a weight of {rows} rows and {columns} columns, and the layer has {outputs} and {inputs}"
    if "diff" in parts and tuple(parts["diff"].shape) != shape:
        return "the change has another shape than the weight"
    lengths = {"dora_scale": shape[1] if is_by_inputs(parts) else outputs, "diff_b": outputs, "rescale": outputs, "alpha": 1}
    of_boft = algorithm_of(parts) == "oft"
    short = [part for part, count in lengths.items() if part in parts and parts[part].numel() != count and not (of_boft and part == "alpha")]
    return f"{short[0]} has {parts[short[0]].numel()} numbers where the layer needs {lengths[short[0]]}" if short else None
