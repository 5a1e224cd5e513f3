"""State of a run from a checkpoint: rank 0 reads, and the others receive; parts of divided tensors are read by each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from runtime import distributed
from runtime.checkpoint import check_weights
from runtime.groups import check_stored
from runtime.parts import is_sharded
from runtime.sharding import is_divided, local, place_of, receive
from runtime.tensor_file import StoredTensor


def check_together(groups: Mapping[str, Mapping[str, StoredTensor]], path: Path, flag: str, *, divided: bool) -> None:
    """Compare a checkpoint with its checksums, and check that it is finite; all processes call this together.

    Args:
        groups: Group name -> tensor name -> tensor.
        path: The checkpoint.
        flag: Flag in messages.
        divided: Processes hold parts of the state: they see the files of a sharded checkpoint, and share the work.

    Raises:
        UserError: On every process, if one of them finds damage.
    """
    rank, ranks = distributed.place()
    with distributed.raise_on_all_ranks():
        if divided and is_sharded(path):
            check_stored(groups, path, flag, rank, ranks)
        elif rank == 0:
            check_stored(groups, path, flag)


def fill(module: nn.Module, weights: Mapping[str, StoredTensor], source: str) -> None:
    """Fill a module, divided or not, with weights that were compared; all processes call this together.

    Raises:
        UserError: As `check_weights`.
    """
    expected = module.state_dict()
    check_weights(expected, {name: stored.outline() for name, stored in weights.items()}, source)
    for name, tensor in expected.items():
        local(tensor).copy_(part_of(weights[name], tensor))


def part_of(stored: StoredTensor, target: Tensor) -> Tensor:
    """This process's part, divided as `target` is, of a stored tensor; all processes call this together.

    Returns:
        A copy, of the dtype and on the device of the target.
    """
    if not (stored.is_shared and is_divided(target)):
        return receive(stored.all_rows() if distributed.place()[0] == 0 else None, target)
    own, (start, _) = local(target), place_of(target)
    return stored.rows(start, start + len(own)).to(own.device, own.dtype, copy=True)
