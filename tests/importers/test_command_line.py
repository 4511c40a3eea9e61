from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.errors import ConfigError
from simpletuner.importers.command_line import read_command, read_flags

FLAGS = {"name": (str, None), "number": (int, 1), "rate": (float, 1.0), "switch": (bool, False), "several": ((str,), None), "numeral": (str, None)}

SCRIPT = r"""#!/bin/bash
# export MODEL="commented out"
export MODEL="some/model" WORDS='not $MODEL'
EXTRA="--switch --number 3"
cd examples && CUDA_VISIBLE_DEVICES=1 accelerate launch --multi_gpu --num_processes=2 --mixed_precision "bf16" folder/train.py \
  --name=$MODEL --several "a \"b\"" '$MODEL' "${MODEL}/x" \ 
  $EXTRA --numeral="$WORDS" > log.txt 2>&1
echo done; ls
"""


def test_a_script_is_read_as_a_shell_would(tmp_path):
    (tmp_path / "train.sh").write_text(SCRIPT)

    command = read_command([str(tmp_path / "train.sh")], {})

    assert command.program == "train.py"
    assert command.launcher == {"multi_gpu": "true", "num_processes": "2", "mixed_precision": "bf16"}
    assert command.variables["CUDA_VISIBLE_DEVICES"] == "1"
    assert command.words == (
        *("--name=some/model", "--several", 'a "b"', "$MODEL", "some/model/x"),
        *("--switch", "--number", "3", "--numeral=not $MODEL"),
    )


def test_a_line_in_quotes_and_the_words_of_a_line_are_the_same():
    line = "A=1 python -m torch.distributed.run --nproc_per_node 2 train.py --name 'two words' --switch"

    assert read_command([line], {}) == read_command(shlex.split(line), {})
    assert read_command([line], {}).launcher["num_processes"] == "2"


def test_variables_come_from_the_environment_too_and_must_be_set():
    assert read_command(["python train.py --name $HERE"], {"HERE": "x"}).words == ("--name", "x")

    with pytest.raises(ConfigError, match=r"refers to \$HERE, which is not set"):
        read_command(["python train.py --name $HERE"], {})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("echo hello", "no Python script"),
        ("python train.py --name 'open", "closing quot"),
        ("python a.py && python b.py", "2 commands"),
    ],
)
def test_what_is_no_command_is_refused(line, said):
    with pytest.raises(ConfigError, match=said):
        read_command([line], {})


COMMENTED = r"""
export MODEL="some/model"   # or another
: ${UNUSED:=$(pwd)}
FOO=1 accelerate launch train.py \
  --name=${MODEL} \
  # --switch \
  --number 3 \ # three
  --several "a #1 cat" 'not # a comment' b#c \
  --numeral="${NUMERAL:-one}"
"""


def test_comments_are_left_out_and_a_command_goes_on_behind_them():
    command = read_command([COMMENTED], {})

    several = ("--several", "a #1 cat", "not # a comment", "b#c")
    assert command.words == ("--name=some/model", "--number", "3", *several, "--numeral=one")
    assert command.variables["FOO"] == "1"


def test_what_only_a_shell_can_fill_in_is_refused_where_it_is_used():
    with pytest.raises(ConfigError, match="only a shell can say"):
        read_command(["OUT=$(date)\npython train.py --name=$OUT"], {})


LETTERS = st.characters(exclude_categories=("Cs", "Co", "Cc"), exclude_characters="\u2028\u2029")
WORDS = st.text(LETTERS, min_size=1).filter(lambda word: word not in ("&&", "||", ";", "|", "&", ";;"))


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_any_words_come_back_from_their_quoted_line(words):
    line = shlex.join(["python", "train.py", "--several", *words, "--switch"]) + " 2>&1 >> log.txt"

    assert read_command([line], {}).words == ("--several", *words, "--switch")


def test_flags_are_read_as_argparse_reads_them():
    words = ["--name=a=b", "--num", "3", "--rate", "-1e-4", "--switch", "--several", "x", "y z"]

    with pytest.raises(ConfigError, match="no flag --num; did you mean --number"):
        read_flags(words, FLAGS, "train.py")  # number or numeral
    words[1] = "--numb"

    assert read_flags(words, FLAGS, "train.py") == {"name": "a=b", "number": 3, "rate": -1e-4, "switch": True, "several": ["x", "y z"]}


def test_a_switch_may_be_written_with_a_truth_and_with_nothing_else():
    assert read_flags(["--switch=False", "--number=2"], FLAGS, "train.py") == {"switch": False, "number": 2}
    assert read_flags(["--switch=true"], FLAGS, "train.py") == {"switch": True}
    with pytest.raises(ConfigError, match="--switch needs no value, not '3'"):
        read_flags(["--switch=3"], FLAGS, "train.py")


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as refused:
        read_flags(["stray", "--nmae", "x", "--number", "three", "--rate", "--name="], FLAGS, "train.py")

    said = refused.value.message
    assert "'stray' belongs to no flag" in said
    assert "train.py has no flag --nmae; did you mean --name?" in said
    assert "--number needs a whole number, not 'three'" in said
    assert "--rate needs a number; was its variable set?" in said
    assert "--name needs a value; was its variable set?" in said


def test_a_prompt_may_begin_with_a_sign_of_redirection():
    assert read_command(["python train.py --name '<sks> dog' > log"], {}).words == ("--name", "<sks> dog")
    assert read_command(["python", "train.py", "--name", "<sks> dog"], {}).words == ("--name", "<sks> dog")
