"""`transformers.TrainingArguments` on a sequence mesh."""

from ringattn.hf.options.option import Option, Refusal
from ringattn.hf.options.trainer import DATA, FIGURES, MODEL, RUNS

IMAGES = "test_trainer_images.py"

# Options that are the same on any mesh, by the reason why.
INERT: dict[str, tuple[str, ...]] = {
    "of the optimizer and its schedule: gradients come to them averaged, the same on every rank": (
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim_args",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules", "adafactor",
    ),
    "reporting by the main process, of numbers that are the same on every rank": (
        "logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level",
        "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "logging_dir",
    ),
    "files, written by the main process": (
        "output_dir", "overwrite_output_dir", "save_on_each_node", "save_total_limit", "save_safetensors",
        "restore_callback_states_from_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
        "hub_strategy", "hub_always_push", "hub_revision",
    ),
    "of use with compute_metrics and predictions only, which are refused": (
        "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
        "include_for_metrics", "batch_eval_metrics",
    ),
    "when to evaluate, told by the step alone": ("eval_delay",),
    "how batches reach the host and the device": (
        "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    ),
    "of DistributedDataParallel, which averages gradients over all ranks as it does without a mesh": (
        "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
    ),
    "of the process group, which is there already when init_mesh has made it": (
        "ddp_backend", "ddp_timeout", "local_rank",
    ),
    "of a rank's device": ("tf32", "torch_empty_cache_steps", "jit_mode_eval"),
    "batches come with use_cache=False; it stays in the configuration that is saved": ("use_cache",),
    "does nothing without use_liger_kernel, which is refused": ("liger_kernel_config",),
    "how torch.compile works, not what it computes": ("torch_compile_backend", "torch_compile_mode"),
    "looks at the local activations of each rank": ("debug",),
    "for scripts; the Trainer does not read them": ("do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
    "a run that goes on begins its epoch again, on all replicas alike": ("ignore_data_skip",),
    "a column of the data set, read alike on every rank": ("length_column_name",),
}  # fmt: skip

TRAINING: dict[str, Option] = {
    **{name: Option(inert=reason) for reason, names in INERT.items() for name in names},
    "per_device_train_batch_size": Option(
        f"{DATA}::test_replicas_with_different_numbers_of_batches",
        note="rows of a batch for each replica, not for each rank",
    ),
    "per_device_eval_batch_size": Option(
        f"{FIGURES}::test_evaluation_counts_every_row_once", note="rows of a batch for each replica, not for each rank"
    ),
    "num_train_epochs": Option(
        f"{DATA}::test_replicas_with_different_numbers_of_batches",
        note="a replica that runs out of batches goes on without targets: no row is repeated",
    ),
    "max_steps": Option(f"{DATA}::test_replicas_with_different_numbers_of_batches"),
    "gradient_accumulation_steps": Option(f"{DATA}::test_replicas_with_different_numbers_of_batches"),
    "optim": Option(
        inert="gradients come to the optimizer averaged, the same on every rank",
        refusal=Refusal(
            "lomo, adalomo",
            "it updates parameters inside of the backward pass, before their gradients are averaged over the ranks",
            lambda value: getattr(value, "value", value) in ("lomo", "adalomo"),
        ),
    ),
    "average_tokens_across_devices": Option(
        f"{RUNS}::test_options_of_training", note="the loss is the mean over the targets of all replicas either way"
    ),
    "max_grad_norm": Option(f"{RUNS}::test_options_of_training", note="of the averaged gradients, as in one process"),
    "label_smoothing_factor": Option(
        refusal=Refusal("other than 0", "the loss is the model's own, and the smoother needs logits of whole sequences")
    ),
    "bf16": Option(f"{RUNS}::test_bf16"),
    "fp16": Option(f"{RUNS}::test_fp16", note="for GPUs only, as in Accelerate"),
    "bf16_full_eval": Option(f"{RUNS}::test_evaluation_in_half_precision"),
    "fp16_full_eval": Option(f"{RUNS}::test_evaluation_in_half_precision"),
    "activation_checkpointing": Option(f"{RUNS}::test_options_of_training"),
    "activation_checkpointing_kwargs": Option(f"{RUNS}::test_options_of_training"),
    "ddp_find_unused_parameters": Option(
        f"{IMAGES}::test_checkpointed_layers_and_micro_batches_without_images",
        note="True by default for models that take images, with checkpointed layers too; where it is False and the "
        "tower is trained, a micro-batch without images on any replica is refused",
    ),
    "gradient_checkpointing": Option(f"{RUNS}::test_options_of_training"),
    "gradient_checkpointing_kwargs": Option(f"{RUNS}::test_options_of_training"),
    "torch_compile": Option(f"{RUNS}::test_torch_compile"),
    "use_liger_kernel": Option(
        refusal=Refusal(
            "True",
            "its fused loss shifts the labels of a rank's tokens by itself. Apply the kernels of the layers to the "
            "model before it comes to the Trainer, without fused_linear_cross_entropy",
        )
    ),
    "neftune_noise_alpha": Option(
        refusal=Refusal(
            "other than 0",
            "its noise is scaled by the number of tokens that a rank holds, and equal on all ranks: it would change "
            "with the number of sequence ranks",
        )
    ),
    "auto_find_batch_size": Option(
        refusal=Refusal(
            "True", "one rank may run out of memory and begin again with smaller batches, while others wait"
        )
    ),
    "logging_steps": Option(f"{RUNS}::test_options_of_training"),
    "include_num_input_tokens_seen": Option(
        f"{FIGURES}::test_tokens_seen", note="tokens of the batches of all replicas, each counted once"
    ),
    "include_tokens_per_second": Option(f"{FIGURES}::test_tokens_seen"),
    "eval_strategy": Option("test_trainer.py::test_the_same_curve", note="the loss is the mean over all targets"),
    "eval_steps": Option("test_trainer.py::test_the_same_curve"),
    "eval_on_start": Option(f"{RUNS}::test_options_of_training"),
    "save_only_model": Option(f"{MODEL}::test_the_best_model_is_loaded_at_the_end"),
    "save_strategy": Option("test_trainer.py::test_resume_in_the_middle_at_another_sequence_size"),
    "save_steps": Option("test_trainer.py::test_resume_in_the_middle_at_another_sequence_size"),
    "enable_jit_checkpoint": Option(
        refusal=Refusal(
            "True",
            "ranks that get the signal at different steps would stop at different steps and wait for each other. Save "
            "by save_steps",
        )
    ),
    "load_best_model_at_end": Option(f"{MODEL}::test_the_best_model_is_loaded_at_the_end"),
    "metric_for_best_model": Option(f"{MODEL}::test_the_best_model_is_loaded_at_the_end"),
    "greater_is_better": Option(f"{MODEL}::test_the_best_model_is_loaded_at_the_end"),
    "full_determinism": Option(f"{MODEL}::test_full_determinism", note="of the attention too"),
    "seed": Option(f"{DATA}::test_seeds_that_differ", note="must be the same on every rank"),
    "data_seed": Option(f"{DATA}::test_seeds_that_differ", note="must be the same on every rank"),
    "use_cpu": Option("test_trainer.py::test_the_same_curve"),
    "accelerator_config": Option(f"{DATA}::test_options_of_the_loader", note="see its own table"),
    "parallelism_config": Option(
        refusal=Refusal(
            "with tp_size, cp_size or sp_size above 1",
            "the mesh is who splits sequences; tensors split over ranks would get different tokens",
            lambda value: any(getattr(value, f"{kind}_size", 1) not in (None, 1) for kind in ("tp", "cp", "sp")),
        )
    ),
    "dataloader_drop_last": Option(
        f"{DATA}::test_replicas_with_different_numbers_of_batches", note="drops what is no batch of all replicas"
    ),
    "dataloader_num_workers": Option(
        f"{DATA}::test_draws_in_workers", note="workers of the ranks of a sequence draw the same"
    ),
    "dataloader_persistent_workers": Option(f"{DATA}::test_draws_in_workers"),
    "dataloader_in_order": Option(
        refusal=Refusal("False", "ranks of a sequence would get their batches in different orders", lambda x: not x)
    ),
    "remove_unused_columns": Option(
        f"{DATA}::test_columns_that_are_kept", note="columns that say where documents are stay"
    ),
    "label_names": Option(
        f"{RUNS}::test_options_of_training",
        refusal=Refusal("other than ['labels']", "targets are read from labels", lambda x: list(x) != ["labels"]),
    ),
    "train_sampling_strategy": Option(
        f"{DATA}::test_every_row_once",
        note='"batch_rebalance" balances over replicas and repeats no row to fill the last step',
    ),
    "group_by_length": Option(f"{DATA}::test_every_row_once"),
    "fsdp": Option(f"{RUNS}::test_fsdp"),
    "fsdp_config": Option(
        f"{RUNS}::test_fsdp",
        refusal=Refusal(
            "with version 1 or xla",
            "only FSDP2 has been tried",
            lambda value: isinstance(value, dict) and (str(value.get("version", 2)) == "1" or value.get("xla", False)),
        ),
    ),
    "deepspeed": Option(f"{RUNS}::test_deepspeed"),
}

ACCELERATOR: dict[str, Option] = {
    "split_batches": Option(
        refusal=Refusal("True", "a batch is cut along its sequence. Give per_device_train_batch_size for a replica")
    ),
    "dispatch_batches": Option(
        refusal=Refusal("True", "every rank of a sequence reads its batch itself. Leave it None or False")
    ),
    "even_batches": Option(
        inert="no row is repeated to fill a batch: replicas that have run out of batches go on without targets"
    ),
    "use_seedable_sampler": Option(f"{DATA}::test_options_of_the_loader"),
    "gradient_accumulation_kwargs": Option(f"{DATA}::test_options_of_the_loader"),
    "non_blocking": Option(inert="how batches reach the device"),
    "use_configured_state": Option(inert="who makes Accelerate's state"),
}
