"""All optimizers and schedules as a page of markdown, docs/optimizers.md: what their rows state, read without torch."""

from __future__ import annotations

from simpletuner.optim.catalogue import OPTIMIZERS, Row
from simpletuner.optim.schedules import SCHEDULES
from simpletuner.options.optim import INSTEAD, SHORT

HEAD = """\
# Optimizers and schedules

Written by `simpletuner optimizers --markdown`; change the rows in `simpletuner/optim/` instead.

`optimizer` names one, `optimizer_config` sets its further arguments: `weight_decay=0.1,betas=(0.9,0.95)`, or an object. All of them run on
GPUs and on the CPU, where each is tested to go on from a checkpoint with the same bytes, and all heed `lr_scheduler` and `max_grad_norm`.

"Remembers" is how many bytes an optimizer keeps for each number that is trained, in a large square matrix; the number itself and its gradient
take 4 bytes each. "In bf16" is the same for those that train bf16 weights, of which number and gradient take 2 bytes each, without losing updates
that are small beside them; see `base_model_default_dtype`, which is for `model_type: full`. "Comes with" is what to install: `simpletuner`, or
`pip install 'simpletuner[optimizers]'`.

| optimizer | comes with | remembers | in bf16 | what it is |
|---|---|---|---|---|
"""
NOTES = """
- Those that find their own rate (`prodigy`, `prodigy_schedulefree`) take no notice of `learning_rate`; `lr_scheduler` still scales what they find.
- Those that average their weights (`adamw_schedulefree`, `radam_schedulefree`, `sgd_schedulefree`, `prodigy_schedulefree`) want `lr_scheduler`
  constant. Pictures, held-out losses, checkpoints and the result show the average; `use_ema` beside it averages twice.
- `bnb-*-paged` page on NVIDIA GPUs; elsewhere they are as those without `-paged`.
- `ao-*` are compiled at the first step, which takes a minute and a C++ compiler.
- `optimizer_release_gradients` goes with all but `prodigy` and `prodigy_schedulefree`, which find one rate from all gradients together.
- `soap` remembers two more square matrices for each side of a matrix up to `max_precondition_dim` (512), which is in its 24 bytes.
"""
SCHEDULES_HEAD = """
## Schedules

`lr_scheduler` names one. All of them begin with `lr_warmup_steps`, in which the rate rises to `learning_rate`. Steps are optimizer steps of the
whole run, on however many processes.

| schedule | what it does | heeds |
|---|---|---|
"""
NAMES_HEAD = """
## Other names

These are understood as well, in upper and lower case:

| name | means |
|---|---|
"""
INSTEAD_HEAD = """
These are not here:

| name | why, and what to take |
|---|---|
"""


def page() -> str:
    """Write the page."""
    return "".join(
        (
            HEAD,
            *(f"| `{row.name}` | {comes_with(row)} | {row.state_bytes:g} | {in_bf16(row)} | {row.summary} |\n" for row in OPTIMIZERS),
            NOTES,
            SCHEDULES_HEAD,
            *(f"| `{row.name}` | {row.summary} | {', '.join(f'`{key}`' for key in sorted(row.heeds)) or '-'} |\n" for row in SCHEDULES),
            NAMES_HEAD,
            *(f"| `{name}` | `{meant}` |\n" for name, meant in SHORT.items()),
            INSTEAD_HEAD,
            *(f"| `{name}` | {why} |\n" for name, why in INSTEAD.items()),
        )
    )


def listing() -> str:
    """The optimizers for a terminal: those that can be used at once, then those that are to be installed."""
    parts = []
    for title, rows in (
        ("Installed:", [row for row in OPTIMIZERS if row.is_installed]),
        ("With pip install 'simpletuner[optimizers]':", [row for row in OPTIMIZERS if not row.is_installed and row.extra]),
        ("Not for this system:", [row for row in OPTIMIZERS if not row.is_installed and not row.extra]),
    ):
        if rows:
            parts.append("\n".join([title, *(f"  {row.name:<24} {row.state_bytes:>4g} bytes  {row.summary}" for row in rows)]))
    return "\n\n".join(parts)


def in_bf16(row: Row) -> str:
    """What it remembers of bf16 weights, and how it keeps small updates of them."""
    return f"{row.bf16_state_bytes:g}, {row.bf16_by}" if row.bf16_by else "-"


def comes_with(row: Row) -> str:
    """What to install for a row."""
    return "simpletuner" if row.extra is None else f"[{row.extra}]"
