"""Lightning's own Trainer arguments that are no settings here: what to use instead of each."""

SET_HERE = "It is set by this program"
# Argument of lightning.pytorch.Trainer -> what to use. Those that schema.Trainer has are real settings.
INSTEAD: dict[str, str] = {
    "fast_dev_run": "Use debug=fast.",
    "limit_train_batches": "One step is one batch: use trainer.max_steps, or trainer.overfit_batches to repeat the first ones.",
    "limit_test_batches": "meshformer evaluate reads the whole part; use trainer.limit_val_batches there.",
    "limit_predict_batches": "Use meshformer generate count=.",
    "min_epochs": "Use trainer.max_epochs.",
    "min_steps": "Use trainer.max_steps.",
    "max_time": "Use +callbacks.timer._target_=lightning.pytorch.callbacks.Timer +callbacks.timer.duration=00:12:00:00.",
    "check_val_every_n_epoch": "Validation counts steps: use trainer.val_check_interval.",
    "num_sanity_val_steps": "Use trainer.val_check_interval=1 to validate early.",
    "enable_checkpointing": "Use ~callbacks.checkpoint to keep none.",
    "enable_progress_bar": "Use trainer.progress.",
    "enable_model_summary": "Use +callbacks.summary._target_=lightning.pytorch.callbacks.RichModelSummary.",
    "gradient_clip_algorithm": "trainer.gradient_clip_val clips by the norm over all processes.",
    "benchmark": "Use trainer.deterministic.",
    "inference_mode": f"{SET_HERE}.",
    "use_distributed_sampler": f"{SET_HERE}: the data module shares one order over the processes.",
    "reload_dataloaders_every_n_epochs": f"{SET_HERE}: the position in the data is one number.",
    "default_root_dir": "Use paths.runs or hydra.run.dir.",
    "strategy": "Use strategy=.",
    "logger": "Use logger=.",
    "callbacks": "Use callbacks.NAME.",
    "plugins": f"{SET_HERE}.",
    "sync_batchnorm": "There is no batch normalisation in these models.",
    "barebones": "Use logger=csv ~callbacks.samples ~callbacks.checkpoint.",
    "model_registry": "Use meshformer export.",
    "enable_autolog_hparams": f"{SET_HERE}: config.yaml holds every setting.",
}
