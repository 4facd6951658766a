"""Every objective trains, from the console's arguments: three steps of the tiny model each."""

from pathlib import Path

import pytest

from repo_ops import objective_names
from repo_ops.cli import main
from repo_ops.trainer.log import read_metrics

COMMAND = "train --model tiny --task copy --steps 3 --prompts_per_step 2 --group_size 4 --train_size 4 --heldout_size 0"
COMMAND += " --autocast false --threads 1 --save_model false --lr 1e-4"


@pytest.mark.slow
def test_every_objective_trains(tmp_path: Path) -> None:
    trained = []
    for name in objective_names():
        folder = tmp_path / name
        arguments = [*COMMAND.split(), "--objective", name, "--output_dir", str(folder)]
        main(arguments)
        lines = read_metrics(folder)
        assert [line["step"] for line in lines] == [0, 1, 2, 3], name
        assert not any(line["learner/nonfinite"] for line in lines[1:]), name
        assert any(line["grad_norm"] > 0 for line in lines[1:]), name
        trained.append(name)
    assert len(trained) == len(objective_names()) > 50
