"""What the main process decides, on one process and on two."""

from pathlib import Path

import pytest

from runtime import distributed
from runtime.errors import UserError
from tests.processes import run_script

TWO = """
import os
from runtime import distributed
from runtime.errors import UserError

def refuse():
    assert os.environ["RANK"] == "0"
    raise UserError("no")

with distributed.world("cpu") as world:
    value = distributed.by_main(lambda: [os.environ["RANK"]])
    try:
        distributed.by_main(refuse)
    except UserError as error:
        os.write(1, f"rank {world.rank}: {value} {error}\\n".encode())  # in one piece: both write into the same pipe
"""


def test_one_process_is_the_main_one() -> None:
    assert distributed.by_main(lambda: 3) == 3
    with pytest.raises(UserError, match="^no$"):
        distributed.by_main(refuse)


def refuse() -> int:
    raise UserError("no")


@pytest.mark.slow
def test_its_result_and_its_error_are_everybody_s(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    done = run_script(tmp_path / "two.py", ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0: ['0'] no", "rank 1: ['0'] no"]


LATE = """
import sys, time
from runtime import distributed
from runtime.errors import UserError, run

def main(argv):
    with distributed.world("cpu") as world:
        if world.is_main:
            time.sleep(2)  # torchrun looks ten times a second, and kills who is left when one has failed
        raise UserError("--flag 3: no")

sys.exit(run(main, "late.py"))
"""


def test_a_mistake_is_said_though_the_process_that_says_it_is_late(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    done = run_script(tmp_path / "late.py", ranks=2, folder=tmp_path)
    assert done.returncode == 1 and done.stderr.count("late.py: error: --flag 3: no") == 1
