"""Run the cells of the matrix of modes: ``torchrun --nproc_per_node N run_cells.py FOLDER`` those of N processes;
``python run_cells.py FOLDER launched`` those whose Trainer starts the processes.
"""

import os
import sys
from pathlib import Path

import torch
from rank_script import end
from support.cells import CELLS, MODES, begin, cell

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["launched"]:
        for part, name in CELLS:
            if MODES[name].launch:
                cell(part, name, folder)
    else:
        processes = int(os.environ["WORLD_SIZE"])
        for part, name in CELLS:
            if MODES[name].begun_by == processes:
                begin(part, name, folder)
            elif MODES[name].processes == processes and not MODES[name].launch:
                cell(part, name, folder)
        end()
