"""An interactive allocation's shell has SLURM_NTASKS, and is no task of it."""

import jobs


def test_training_in_the_shell_of_an_allocation_is_one_process(tmp_path, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    rows = jobs.run_tiny(tmp_path, "run", "trainer.max_steps=2")
    assert rows[-1]["step"] == 2
