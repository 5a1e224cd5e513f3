"""Tables of Wang et al., 2025 (arXiv 2505.21114), for the official weights of DiT-XL/2 and SiT-XL/2 at 256 pixels.

The authors report FIDs of 2.33 for DiT-XL/2 in 10 evaluations; for SiT-XL/2 in 5 to 10 evaluations 4.92, 3.57, 2.78,
2.65, 2.47 and 2.40. They were not checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.solver_table import Levels, SolverTable, read_table

Numbers = tuple[float, ...]


class Published(NamedTuple):
    """Tables of one network.

    Attributes:
        process: Name of its process.
        rows: Evaluations -> sizes of the steps, and from the second step on the weights of earlier predictions.
    """

    process: str
    rows: dict[int, tuple[Numbers, tuple[Numbers, ...]]]


# fmt: off
PUBLISHED: dict[str, Published] = {
    "DiT-XL/2": Published("gaussian", {
        5: (
            (0.2582, 0.1766, 0.1766, 0.2156, 0.1731),
            (
                (-1.43,),
                (0.93, -1.55),
                (0.0, 0.0, -0.69),
                (0.0, 0.0, 0.0, -0.59),
            ),
        ),
        6: (
            (0.2483, 0.1506, 0.1476, 0.1568, 0.1733, 0.1233),
            (
                (-1.36,),
                (0.9, -1.84),
                (-0.08, 0.5, -1.08),
                (0.0, 0.0, 0.0, -0.56),
                (0.0, 0.0, 0.0, 0.0, -0.56),
            ),
        ),
        7: (
            (0.2241, 0.1415, 0.1205, 0.1158, 0.1443, 0.1627, 0.0911),
            (
                (-1.38,),
                (1.08, -2.02),
                (-0.28, 0.78, -1.52),
                (0.0, -0.1, 0.64, -1.5),
                (0.06, -0.06, -0.06, 0.26, -1.0),
                (0.0, -0.1, 0.02, 0.2, 0.26, -1.12),
            ),
        ),
        8: (
            (0.2033, 0.1476, 0.1094, 0.099, 0.1116, 0.1233, 0.131, 0.0748),
            (
                (-1.14,),
                (0.8, -1.76),
                (0.02, 0.48, -1.62),
                (-0.12, 0.06, 0.62, -1.42),
                (0.04, -0.1, 0.12, 0.16, -1.04),
                (0.06, -0.04, -0.06, 0.08, -0.08, -0.56),
                (-0.02, -0.04, -0.04, 0.12, 0.14, 0.04, -0.9),
            ),
        ),
        9: (
            (0.1959, 0.1313, 0.1142, 0.0863, 0.0898, 0.0916, 0.1119, 0.1054, 0.0735),
            (
                (-1.28,),
                (0.78, -1.62),
                (-0.02, 0.44, -1.48),
                (-0.1, 0.16, 0.36, -1.3),
                (-0.06, -0.04, 0.22, 0.12, -1.08),
                (0.08, -0.1, -0.04, 0.24, -0.06, -0.86),
                (0.04, -0.04, -0.04, 0.0, 0.06, -0.08, -0.5),
                (-0.04, 0.0, 0.0, -0.02, 0.14, 0.02, 0.0, -0.74),
            ),
        ),
        10: (
            (0.2174, 0.1123, 0.1037, 0.0724, 0.0681, 0.0816, 0.0938, 0.0977, 0.0849, 0.0681),
            (
                (-1.17,),
                (0.35, -0.99),
                (0.25, -0.11, -0.99),
                (0.03, 0.05, -0.07, -0.85),
                (-0.03, 0.03, 0.25, -0.09, -0.93),
                (-0.01, -0.03, -0.01, 0.21, -0.11, -0.67),
                (0.01, -0.03, -0.03, 0.07, 0.09, -0.03, -0.81),
                (0.03, -0.03, -0.03, -0.03, 0.05, 0.01, -0.11, -0.27),
                (-0.01, -0.01, -0.01, -0.01, 0.03, 0.07, -0.01, -0.05, -0.57),
            ),
        ),
    }),
    "SiT-XL/2": Published("flow", {
        5: (
            (0.0424, 0.1225, 0.2144, 0.3073, 0.3135),
            (
                (-1.17,),
                (1.07, -1.83),
                (0.0, 0.0, -0.93),
                (0.0, 0.0, 0.0, -0.71),
            ),
        ),
        6: (
            (0.0389, 0.0976, 0.161, 0.2046, 0.2762, 0.2217),
            (
                (-1.04,),
                (1.62, -2.98),
                (-1.32, 2.52, -2.04),
                (0.0, 0.0, 0.0, -0.76),
                (0.0, 0.0, 0.0, 0.0, -0.66),
            ),
        ),
        7: (
            (0.0299, 0.0735, 0.1119, 0.1451, 0.1959, 0.2698, 0.1738),
            (
                (-0.93,),
                (1.23, -2.31),
                (-0.59, 1.53, -2.09),
                (-0.09, -0.07, 0.99, -1.91),
                (0.05, -0.21, 0.09, 0.55, -1.47),
                (-0.05, 0.19, -0.31, 0.37, 0.67, -1.79),
            ),
        ),
        8: (
            (0.0303, 0.0702, 0.0716, 0.1112, 0.1501, 0.1833, 0.2475, 0.1358),
            (
                (-0.92,),
                (0.78, -1.7),
                (0.06, 0.52, -1.76),
                (-0.02, -0.16, 0.98, -1.8),
                (-0.02, -0.12, 0.22, 0.24, -1.36),
                (-0.1, 0.06, -0.02, 0.18, 0.12, -1.1),
                (-0.16, 0.14, -0.02, -0.02, 0.38, 0.32, -1.72),
            ),
        ),
        9: (
            (0.028, 0.0624, 0.0717, 0.0894, 0.1092, 0.1307, 0.1729, 0.2198, 0.1159),
            (
                (-0.93,),
                (0.63, -1.29),
                (0.39, -0.11, -1.41),
                (-0.07, -0.05, 0.83, -1.59),
                (0.07, -0.11, 0.27, 0.27, -1.53),
                (-0.05, 0.03, 0.01, 0.15, 0.17, -1.15),
                (-0.21, 0.27, -0.07, -0.03, 0.19, 0.09, -0.99),
                (-0.15, 0.15, 0.03, -0.09, 0.25, 0.25, 0.21, -1.71),
            ),
        ),
        10: (
            (0.0279, 0.0479, 0.0646, 0.0659, 0.1045, 0.1066, 0.1355, 0.1622, 0.1942, 0.0908),
            (
                (-0.95,),
                (0.59, -1.17),
                (0.35, -0.11, -1.45),
                (-0.13, 0.01, 0.75, -1.49),
                (0.05, -0.05, 0.31, 0.29, -1.59),
                (0.05, -0.03, -0.09, 0.23, 0.17, -1.19),
                (-0.03, 0.07, -0.09, -0.03, 0.27, -0.03, -0.91),
                (-0.15, 0.17, 0.03, -0.09, 0.05, 0.09, 0.05, -0.79),
                (-0.17, 0.11, 0.15, 0.03, 0.05, 0.25, 0.05, -0.07, -1.49),
            ),
        ),
    }),
}
# fmt: on


def open_table(source: str, evaluations: int | None = None) -> SolverTable:
    """Read a table of search_solver.py, or a published one by its name.

    Args:
        source: File, or a name in `PUBLISHED`.
        evaluations: Number of evaluations; None takes the file's, and 10 of a published one.

    Raises:
        ValueError: If there is none, it is damaged, or is for another number of evaluations.
    """
    if source in PUBLISHED:
        return published_table(source, evaluations or 10)
    table = read_table(Path(source))
    if evaluations not in (None, table.evaluations):
        raise ValueError(f"a table of {table.evaluations} evaluations, not {evaluations}")
    return table


def published_table(name: str, evaluations: int) -> SolverTable:
    """One of the tables of the authors, for the official weights. Their FIDs were not checked here.

    Raises:
        ValueError: For an unknown name, or a number of evaluations without a table.
    """
    tables = PUBLISHED[name]
    if evaluations not in tables.rows:
        raise ValueError(f"{name} has tables for {', '.join(map(str, tables.rows))} evaluations, not {evaluations}")
    sizes, rows = tables.rows[evaluations]
    weights = tuple((*row, 1 - sum(row)) for row in ((), *rows))
    times, levels = published_times(tables, sizes)
    return SolverTable(tables.process, times, levels, weights, {"source": f"arXiv 2505.21114, {name}"})


def published_times(tables: Published, sizes: Sequence[float]) -> tuple[tuple[float, ...], Levels]:
    """Times in the process's units and levels of published step sizes."""
    if tables.process == "flow":
        ends = np.minimum(np.cumsum([0.0, *sizes]), 1.0)
        return tuple(ends.tolist()), tuple(zip(ends.tolist(), (1 - ends).tolist(), strict=True))
    t = np.clip(0.999 - np.cumsum([0.0, *sizes]), 1e-3, 1)
    log_alpha = -(9.95 * t**2 + 0.1 * t) / 2  # the authors' continuous form of linear betas
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    return tuple((1000 * t).tolist()), tuple(zip(alpha.tolist(), sigma.tolist(), strict=True))
