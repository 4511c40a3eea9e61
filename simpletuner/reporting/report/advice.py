"""What to do next, from what is known of a run: a few sentences, each with a reason and where possible a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simpletuner.reporting.report.curve import Curve, mean_of
from simpletuner.reporting.report.state import State

RISEN, FALLEN = 1.03, 0.98
"""Of the best held-out loss, from which it counts as risen; and the share of the loss before, below which it is falling still."""
MOST_OF_TIME = 0.3
"""Of the whole, that looking may take without a word."""
CLIPPED = 3.0
"""Times `max_grad_norm`, from which most of a gradient is thrown away."""
Advice = dict[str, str]


def advise(state: State, evaluations: Sequence[Mapping[str, float]], best: Mapping[str, Any] | None) -> list[Advice]:
    """Sentences with a kind (good, note, warning, error), what matters most first.

    Args:
        evaluations: rows of evaluation.jsonl.
        best: the best evaluation, see `best_of`.
    """
    found = [*_of_end(state), *_of_evaluations(state, evaluations, best), *_of_curves(state), *_of_time(state)]
    if state.status == "finished":
        found += list(_of_result(state))
    order = ("error", "warning", "good", "note")
    return sorted(found, key=lambda one: order.index(one["kind"]))


def _said(kind: str, text: str, command: str = "") -> Advice:
    return {"kind": kind, "text": text, "command": command}


def _where(state: State) -> str:
    """What a command needs to find the model."""
    return str(state.facts.get("where", ""))


def _output(state: State) -> str:
    return shlex.quote(str(state.facts.get("output", "output")))


def _of_end(state: State) -> Iterator[Advice]:
    if state.status == "failed":
        saved = f" It goes on from step {max(state.checkpoints)}." if state.checkpoints else ""
        yield _said("error", f"The run ended by an error: {state.ended}. Once that is mended, run the same command again.{saved}")
    elif state.status == "stopped":
        yield _said("note", f"{state.ended[:1].upper()}{state.ended[1:]}. Run the same command again to go on.")
    elif state.status == "running":
        yield _said("note", "To see it live, with pictures while they are made:", f"simpletuner watch {_output(state)}")


def _of_evaluations(state: State, rows: Sequence[Mapping[str, float]], best: Mapping[str, Any] | None) -> Iterator[Advice]:
    if best is None:
        if state.status != "starting":
            yield _said("note", "No picture is held out, so nothing tells when it begins to overfit: add a dataset of dataset_type eval.")
        return
    what = {"loss": "held-out loss", "clip": "CLIP score"}[best["metric"]]
    values = {int(row["step"]): mean for row in rows if row["step"] and (mean := _mean(row, best["metric"])) is not None}
    later = [step for step in sorted(values) if step > best["step"]]
    is_worse = bool(later) and best["metric"] == "loss" and values[later[-1]] > RISEN * best["value"]
    if len(later) > 1 and is_worse:
        rise = values[later[-1]] / best["value"] - 1
        text = f"The held-out loss is lowest at step {best['step']} and {rise:.0%} higher at step {later[-1]}: since then the run overfits."
        yield _said("warning", f"{text} Use an earlier checkpoint, or train with a lower learning_rate, fewer repeats, or more pictures.")
    if later and state.status != "running" and best["is_saved"] and state.facts.get("is_adapter"):
        command = f"simpletuner generate --adapter {_output(state)}/checkpoint-{best['step']}{_where(state)}"
        yield _said("good", f"By {what} the best checkpoint is not the last: checkpoint-{best['step']} ({best['value']:.4f}).", command)
    elif later and is_worse and not best["is_saved"]:
        text = f"The best step, {best['step']}, was not saved: let checkpoint_step_interval divide eval_steps_interval."
        yield _said("note", text)
    before = [values[step] for step in sorted(values) if step <= 0.75 * best["step"]]
    if not later and state.status == "finished" and best["metric"] == "loss" and before and best["value"] < FALLEN * min(before):
        longer = int(1.5 * state.total_steps)
        text = f"The held-out loss was still falling at the end: with max_train_steps {longer} the same command goes on from here."
        yield _said("good", text)


def _mean(row: Mapping[str, float], metric: str) -> float | None:
    if metric == "clip":
        return row.get("clip/mean")
    losses = [value for name, value in row.items() if name.startswith("loss/val/") and "/" not in name.removeprefix("loss/val/")]
    return sum(losses) / len(losses) if losses else None


def _of_curves(state: State) -> Iterator[Advice]:
    loss, norm = state.curves.get("loss", Curve()).bins, state.curves.get("grad_norm", Curve()).bins
    if len(loss) >= 40:
        tenth = len(loss) // 10
        first, last = mean_of(loss[:tenth]), mean_of(loss[-tenth:])
        if last > 1.2 * first:
            yield _said("warning", f"The loss rose, from {first:.4f} to {last:.4f}: learning_rate is too high for this optimizer.")
    limit = float(state.facts.get("max_grad_norm") or 0)
    if len(norm) >= 40 and limit:
        usual = mean_of(norm[len(norm) // 2 :])
        if usual > CLIPPED * limit:
            text = f"Gradients are {usual / limit:.0f} times as long as max_grad_norm {limit:g} lets them be: it, not learning_rate, sets the step."
            yield _said("note", text)
    if state.ran_out:
        text = f"Memory ran out {state.ran_out:.0f} times; batches were split, no picture was left out. A lower train_batch_size saves the retries."
        yield _said("warning", text)


def _of_time(state: State) -> Iterator[Advice]:
    total = state.seconds
    looking = state.phases.get("validation", 0.0) + state.phases.get("held-out loss", 0.0)
    if total > 120 and state.step and looking > MOST_OF_TIME * total:
        text = f"Looking took {looking / total:.0%} of the time: a larger validation_step_interval, fewer prompts or sampling steps help."
        yield _said("note", text)


def _of_result(state: State) -> Iterator[Advice]:
    if not state.facts.get("is_adapter"):
        return
    text = "Make pictures with what was trained" + (" (… is a folder that this page does not name)" if _where(state) else "")
    yield _said("good", f"{text}:", f'simpletuner generate "your prompt" --adapter {_output(state)}{_where(state)}')
    if len(state.checkpoints) > 1:
        command = f"simpletuner compare {_output(state)} --checkpoints all --strength 0.5,1{_where(state)}"
        yield _said("note", "Lay its checkpoints side by side, at several strengths:", command)
