"""What training holds grows by one layer's states, whatever the number of layers and the length of the texts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEW, MANY = 1000, 9000
WIDTH, LAYERS, TEXT = 256, 4, 4000
STATES = (MANY - FEW) * WIDTH * 4  # bytes of one layer's
SLACK = 14e6  # all layers would be 24.6 MB more, the texts 32 MB


@pytest.mark.slow
def test_many_queries_need_no_more_memory_than_one_layers_states(tmp_path):
    command = [sys.executable, "-m", "tests.unit.test_training_memory", str(tmp_path)]
    freed = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # what is freed is given back at once
    environment = os.environ | freed | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    few, many = (int(line) for line in told.splitlines()[-2:])
    assert STATES / 2 < many - few < STATES + SLACK, (
        f"grew by {(many - few) / 1e6:.1f} MB for {STATES / 1e6:.1f} MB of states"
    )


def peak_after_training(folder: Path, count: int) -> int:
    """This process's largest resident set in bytes, once a profile was trained on `count` long general queries."""
    from steering.training.options import TrainingOptions
    from steering.training.trainer import train
    from tests.tiny import tiny_model, tiny_tokenizer

    files = {  # written a row at a time: the peak is to be training's
        "general": ({"query": f"bake {i} ".ljust(TEXT, "a")} for i in range(count)),
        "ir": ({"query": f"break {i}"} for i in range(100)),
        "pairs": ({"query": f"break {i}", "preferred": "no", "undesired": "yes"} for i in range(20)),
    }
    for name, rows in files.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'][:12] }}<|assistant|>"  # long to hold, short to read
    paths = {name: [folder / f"{name}.jsonl"] for name in ("pairs", "ir", "general")}
    options = TrainingOptions(
        "t", "auto", method="caa", centre="general", rank=4, force=True, batch_tokens=1024, **paths
    )
    model = tiny_model(hidden_size=WIDTH, num_hidden_layers=LAYERS)
    train(model, tokenizer, options, model_id="tiny")
    # Not getrusage's: on Linux that of a child begins with what its parent held.
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024


if __name__ == "__main__":
    for count in (FEW, MANY):
        print(peak_after_training(Path(sys.argv[1]), count))
