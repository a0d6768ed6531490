"""TRL's `SFTConfig` on a sequence mesh, beside what it has from `TrainingArguments`."""

from ringattn.hf.options.option import Option, Refusal

TESTS = "test_trainer_sft.py"
PREPARED = "prepares the data set, the same on every rank"

SFT: dict[str, Option] = {
    **{
        name: Option(inert=PREPARED)
        for name in (
            "chat_template_path",
            "dataset_text_field",
            "dataset_kwargs",
            "dataset_num_proc",
            "eos_token",
            "pad_token",
            "shuffle_dataset",
            "truncation_mode",
        )
    },
    "model_init_kwargs": Option(inert="for loading the model"),
    "trust_remote_code": Option(inert="for loading the model"),
    "max_length": Option(f"{TESTS}::test_the_same_curve"),
    "packing": Option(f"{TESTS}::test_the_same_curve"),
    "packing_strategy": Option(f"{TESTS}::test_the_same_curve"),
    "padding_free": Option(f"{TESTS}::test_the_same_curve"),
    "pad_to_multiple_of": Option(f"{TESTS}::test_the_same_curve"),
    "eval_packing": Option(f"{TESTS}::test_the_same_curve"),
    "completion_only_loss": Option(f"{TESTS}::test_the_same_curve"),
    "assistant_only_loss": Option(f"{TESTS}::test_the_same_curve"),
    "loss_type": Option(
        f"{TESTS}::test_the_same_curve",
        refusal=Refusal(
            "other than 'nll'",
            "OnMesh has the mean over all targets of the global batch, the model's own loss; use loss_type='nll'",
            lambda value: value not in ("nll", "chunked_nll"),
        ),
        note="the mean over all targets; entropy and token accuracy are not logged",
    ),
    "activation_offloading": Option(f"{TESTS}::test_activation_offloading", note="needs CUDA"),
    "router_aux_loss_coef": Option(
        f"{TESTS}::test_routers",
        note="over all tokens of a replica's micro-batch; micro-batches and replicas count by their targets, with TRL "
        "all alike",
    ),
}
