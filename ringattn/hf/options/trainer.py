"""Arguments and methods of `transformers.Trainer` and TRL's `SFTTrainer` on a sequence mesh."""

from ringattn.hf.options.option import Option, Refusal

LOGITS = "a rank holds a part of the logits only"
DATA = "test_trainer_data.py"
FIGURES = "test_trainer_figures.py"
RUNS = "test_trainer_runs.py"
MODEL = "test_trainer_model.py"

ARGUMENTS: dict[str, Option] = {
    "model": Option("test_trainer.py::test_the_same_curve", note="is parallelized whenever it is set"),
    "model_init": Option(f"{MODEL}::test_models_that_are_set_later"),
    "args": Option("test_trainer.py::test_the_same_curve", note="see the tables below"),
    "data_collator": Option(
        f"{DATA}::test_draws_of_the_collator",
        note="makes the batch of a whole sequence; what it draws is the same on all ranks of it; images stand in the "
        "order of their tokens, pixel_values of all rows end to end (`test_trainer_images.py`)",
    ),
    "train_dataset": Option(f"{DATA}::test_every_row_once", note="the whole one on every rank; rows are dealt here"),
    "eval_dataset": Option(f"{FIGURES}::test_evaluation_counts_every_row_once", note="the same; one or several"),
    "processing_class": Option(inert="for the collator and files"),
    "compute_loss_func": Option(refusal=Refusal("any", LOGITS, lambda _: True)),
    "compute_metrics": Option(refusal=Refusal("any", LOGITS, lambda _: True)),
    "preprocess_logits_for_metrics": Option(refusal=Refusal("any", LOGITS, lambda _: True)),
    "callbacks": Option(
        f"{RUNS}::test_callbacks",
        note="run on every rank; what one rank decides after a step (to stop, save, evaluate, log) all do",
    ),
    "optimizers": Option(f"{RUNS}::test_optimizers_with_modes"),
    "optimizer_cls_and_kwargs": Option(inert="gradients come to them averaged, the same on every rank"),
    "formatting_func": Option(inert="works on the data set, the same on every rank"),
    "peft_config": Option("test_trainer_sft.py::test_adapters"),
    "quantization_config": Option(inert="for loading the model"),
}

METHODS: dict[str, Option] = {
    "train": Option("test_trainer.py::test_the_same_curve"),
    "evaluate": Option(f"{FIGURES}::test_evaluation_counts_every_row_once"),
    "predict": Option(refusal=Refusal("", LOGITS)),
    "hyperparameter_search": Option(
        f"{MODEL}::test_models_that_are_set_later", note="the model of every trial is parallelized"
    ),
    "save_model": Option(f"{MODEL}::test_the_best_model_is_loaded_at_the_end"),
    "model = ...": Option(f"{MODEL}::test_models_that_are_set_later"),
}
