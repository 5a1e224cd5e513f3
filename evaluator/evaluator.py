"""`python evaluator/evaluator.py REF.npz SAMPLES.npz`, ADM's command, from any directory: the same as -m evaluator."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python searches the script's folder first, where this file would be taken for the package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module("evaluator", run_name="__main__", alter_sys=True)
