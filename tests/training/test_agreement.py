"""Processes stop together, and do not wait for each other to find out."""

from __future__ import annotations

import pytest
import torch

from simpletuner.training.agreement import Agreement

CPU = torch.device("cpu")


class Others:
    """An accelerator as one of several processes sees it."""

    def __init__(self, processes: int = 2) -> None:
        self.num_processes, self.theirs, self.gathered = processes, 0, 0

    def gather(self, mine):
        self.gathered += 1
        return torch.cat([mine, torch.tensor([self.theirs])])


@pytest.mark.parametrize("whose", ["mine", "theirs"])
def test_a_stop_after_a_step_is_known_to_all_a_step_later(whose):
    others, asked = Others(), []
    agreement = Agreement(others, CPU, lambda: 143 if asked else None)

    before = [agreement.after_step(), agreement.after_step()]
    if whose == "mine":
        asked.append(True)
    others.theirs = 143 if whose == "theirs" else 0

    assert before == [None, None]
    assert agreement.after_step() is None and agreement.after_step() == 143


def test_now_waits_for_the_answer():
    others = Others()
    agreement = Agreement(others, CPU, lambda: None)
    agreement.after_step()
    others.theirs = 130

    assert agreement.now() == 130


def test_one_process_needs_nobody():
    others = Others(processes=1)
    agreement = Agreement(others, CPU, lambda: 130)

    assert agreement.after_step() == agreement.now() == 130 and others.gathered == 0
