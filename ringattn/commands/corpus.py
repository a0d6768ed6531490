"""Write a made-up corpus that teaches a small model to look facts up, far back in a document.

    ringattn corpus short.jsonl --words 400000 --tokenizer tokenizer
    ringattn corpus long.jsonl --words 500000 --shortest 2048 --longest 8192 --seed 1

One document a line, as data=text reads it; the same options write the same file. With a tokenizer
that was trained on it (--tokenizer) every word is a token. `ringattn evaluate wording=plain` asks
for facts as the corpus does. See ringattn/training/evaluation/corpus.py for what stands in it, and
why.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="to write, .jsonl")
    parser.add_argument("--words", type=int, default=400_000, help="of all documents, default 400000")
    parser.add_argument("--shortest", type=int, default=256, help="words of a long document at least, default 256")
    parser.add_argument("--longest", type=int, default=1024, help="words of a long document at most, default 1024")
    parser.add_argument(
        "--dense", type=float, default=0.5, help="share of words in short, dense documents, default 0.5"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, default 0")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="train a tokenizer (byte-level BPE) on it, too, and save it"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=1024, metavar="N", help="tokens that it may have, default 1024"
    )


def run(args: argparse.Namespace) -> int:
    from ringattn.training.data.bpe import train_bpe
    from ringattn.training.evaluation.corpus import RetrievalCorpus

    if args.file.suffix != ".jsonl":
        args.parser.error(f"argument file: expected a name that ends in .jsonl, got {str(args.file)!r}")
    try:
        corpus = RetrievalCorpus(args.words, args.shortest, args.longest, args.dense, seed=args.seed)
    except ValueError as error:
        args.parser.error(str(error))
    if args.tokenizer is not None:
        check_tokenizer(args)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    partial = args.file.with_name(args.file.name + ".partial")
    documents = words = 0
    with open(partial, "w") as file:
        for text in corpus.documents():
            file.write(json.dumps({"text": text}) + "\n")
            documents, words = documents + 1, words + text.count(" ")
    partial.replace(args.file)
    print(f"{args.file}: {documents:,} documents, {words:,} words")
    if args.tokenizer is not None:
        print(f"{args.tokenizer}: {train_bpe(corpus.documents(), args.tokenizer, args.vocabulary):,} tokens")
    return 0


def check_tokenizer(args: argparse.Namespace) -> None:
    """Ends the program, before anything is written, for a tokenizer that cannot be made."""
    from ringattn.training.data.bpe import LEAST

    if find_spec("transformers") is None:
        args.parser.error("--tokenizer needs transformers, which is not installed: pip install 'ringattn[train]'")
    if args.vocabulary < LEAST:
        args.parser.error(f"argument --vocabulary: expected at least {LEAST}, got {args.vocabulary}")
    if args.tokenizer.exists() and not args.tokenizer.is_dir():
        args.parser.error(f"argument --tokenizer: expected a folder, got the file {str(args.tokenizer)!r}")
