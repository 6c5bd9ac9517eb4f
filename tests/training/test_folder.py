"""Laws of a run's folder: which settings a run may change when it goes on."""

import pytest

from moejax import config as config_lib
from moejax.config import plain
from moejax.training import folder


@pytest.mark.parametrize(
    ("path", "blocks"),
    [
        ("model.d_model", True), ("model.moe.capacity_factor", True), ("data.source", False), ("data.packing", True),
        ("model.mamba.scan", False), ("model.mamba.d_state", True), ("model.mamba.chunk_size", False),
        ("model.mamba2.scan", False), ("model.mamba2.chunk_size", False),
        ("data.text_field", True), ("data.seed", True),
        ("data.batch_size", True), ("training.seed", True), ("training.init_from", True),
        ("training.num_steps", False), ("mesh.data", False),
        ("optimizer.learning_rate", False), ("optimizer.name", True), ("optimizer.adafactor.clip_rms", False),
        ("optimizer.adafactor.min_factored_dim", True), ("checkpoint.every", False), ("data.num_workers", False),
    ],
)  # fmt: skip
def test_a_run_goes_on_only_while_its_model_and_rows_stay_the_same(path, blocks):
    assert path in plain.flatten(config_lib.Config())
    assert folder.blocks_resume(path) is blocks


def test_a_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(config_lib.ConfigError, match=r"^--workdir=\S+file is a file; name the folder of a run$"):
        folder.load_config(tmp_path / "file")
