"""Write the model that a run trained as a folder that transformers and vLLM load.

    ringattn export outputs/llama-books my-model      the newest good checkpoint
    ringattn export outputs/llama-books my-model --best
    ringattn export outputs/llama-books my-model --step 400 --dtype float32
    ringattn export outputs/llama-lora my-adapter --adapter

RUN is the run's folder (run.output); OUT must not exist, or be empty. It gets the weights
(safetensors), the configuration with the rotary positions that were trained, the tokenizer,
generation settings, and a model card with data, length and evaluation. Factors of model.lora are
merged, or with --adapter written alone, as PEFT loads them. Memory holds one tensor at a time; no
GPU and no other process is needed.

Exit code 0 if OUT is complete, 1 if it could not be written, 2 for what cannot be exported.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from ringattn.commands._call import integer

STEPS = 10**8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, which must not exist or be empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=integer(STEPS), metavar="N", help="of a checkpoint, default the newest good one")
    which.add_argument("--best", action="store_true", help="the checkpoint with the least validation loss")
    parser.add_argument("--adapter", action="store_true", help="factors of model.lora alone, as PEFT loads them")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights, default what the run computed in",
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default the one that the run read its text with")
    parser.add_argument(
        "--shard-size", type=integer(10**6), default=5000, metavar="MB", help="most of a file of weights, default 5000"
    )


def run(args: argparse.Namespace) -> int:
    for package in ("transformers", "accelerate"):
        if find_spec(package) is None:
            args.parser.error(f"this needs {package}, which is not installed: pip install 'ringattn[train]'")
    import transformers

    from ringattn.training.export import ExportOptions, export

    transformers.logging.set_verbosity_error()
    options = ExportOptions(
        args.step, args.best, args.adapter, args.dtype, args.tokenizer, shard_bytes=args.shard_size * 10**6
    )
    try:
        done = export(args.run_folder.expanduser(), args.out.expanduser(), options)
    except ValueError as error:
        args.parser.error(str(error))
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{args.out}: step {done.step:,}, {done.tensors:,} tensors, {done.size / 10**9:,.3f} GB in {done.dtype}")
    return 0
