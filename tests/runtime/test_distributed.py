"""Work of rank 0, whose result or error every rank receives."""

from pathlib import Path

import pytest
import torch.distributed as dist

from runtime import distributed
from runtime.errors import RankError, UserError, run
from tests.processes import run_ranks, run_script

TWO = """
import os
from runtime import distributed
from runtime.errors import UserError

def refuse():
    assert os.environ["RANK"] == "0"
    raise UserError("no")

with distributed.world("cpu") as world:
    value = distributed.on_rank0(lambda: [os.environ["RANK"]])
    try:
        distributed.on_rank0(refuse)
    except UserError as error:
        os.write(1, f"rank {world.rank}: {value} {error}\\n".encode())  # in one piece: both write to the same pipe
"""


def test_a_single_process_is_rank_0() -> None:
    assert distributed.on_rank0(lambda: 3) == 3
    with pytest.raises(UserError, match="^no$"):
        distributed.on_rank0(refuse)


def refuse() -> int:
    raise UserError("no")


@pytest.mark.slow
def test_every_rank_has_the_result_and_the_error_of_rank_0(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    done = run_script(tmp_path / "two.py", ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0: ['0'] no", "rank 1: ['0'] no"]


VOTES = """
import os, time
from pathlib import Path
from runtime import distributed

with distributed.world("cpu") as world, distributed.Votes() as votes:
    while world.rank == 1 and not Path("asked").exists():  # for ever, if rank 0 waited for this one
        time.sleep(0.01)
    answers = [votes.ask(world.rank == 0)]
    Path("asked").touch()
    answers += [votes.ask(False), votes.ask(False)]
    votes.ask(True)  # in flight at the end
    os.write(1, f"{answers}\\n".encode())
"""


def test_votes_are_answered_one_step_later_on_all_ranks_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "votes.py").write_text(VOTES)
    done = run_ranks(tmp_path / "votes.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[False, True, False]"] * 2


def test_a_single_process_has_its_own_vote_at_once() -> None:
    with distributed.Votes() as votes:
        assert votes.ask(True) and not votes.ask(False)


LATE = """
import sys, time
from runtime import distributed
from runtime.errors import UserError, run

def main(argv):
    with distributed.world("cpu") as world:
        if world.is_main:
            time.sleep(2)  # torchrun polls ten times a second, and kills all others after a failure
        raise UserError("--flag 3: no")

sys.exit(run(main, "late.py"))
"""


def test_an_error_is_printed_though_rank_0_is_late(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    done = run_script(tmp_path / "late.py", ranks=2, folder=tmp_path)
    assert done.returncode == 1 and done.stderr.count("late.py: error: --flag 3: no") == 1


def test_an_error_that_several_ranks_meet_is_printed_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dist.HashStore()

    def fail(text: str) -> None:
        error = RankError(text)
        error.is_repeated = distributed._is_repeated(store, error)
        raise error

    for rank, text in (1, "a: bad"), (0, "a: bad"), (2, "b: bad"):
        monkeypatch.setenv("RANK", str(rank))
        assert run(lambda argv, text=text: fail(text), "x", []) == 2
    assert capsys.readouterr().err == "x: error: a: bad\nx: error: b: bad\n"
    gone = dist.TCPStore("localhost", 0, is_master=True)
    left = dist.TCPStore("localhost", gone.port)
    del gone
    assert not distributed._is_repeated(left, RankError("a"))
