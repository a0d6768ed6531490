"""What a training run would learn from: documents, lengths, packs, and samples with what is learned of them.

    ringattn data data=text 'data.files=[/data/books]' data.seq_len=65536
    ringattn data data=sources 'data.sources=[{path: /data/chats.jsonl, kind: chat}]' model.path=/models/qwen
    ringattn data --config-dir mine --config-name long-books --no-color

Takes the configuration of `ringattn train`, and trains nothing. Text is tokenized into the cache
that training uses. The packs of the run's first steps are planned as the run would plan them, and
drawn into a picture. What is learned of the samples is green, what is only read is grey; without a
terminal, or with --no-color, what is learned stands in «». Exit code 2 for wrong arguments and for
data that cannot be used.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringattn.commands._call import integer
from ringattn.shipped import CONFIGS

if TYPE_CHECKING:
    from omegaconf import DictConfig

SAMPLES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ringattn data [options] [overrides]"
    parser.epilog = f"The shipped configuration, with a comment on every key: {CONFIGS}"
    parser.allow_abbrev = False
    parser.set_defaults(overrides=[])
    parser.add_argument("--config-dir", type=Path, metavar="FOLDER", help="with configuration files of your own")
    parser.add_argument("--config-name", default="train", metavar="NAME", help="file to start from, default train")
    parser.add_argument(
        "--draw", default="data.png", metavar="FILE", help="the picture, .png or .svg, default data.png"
    )
    parser.add_argument("--no-draw", action="store_true", help="no picture")
    parser.add_argument("--samples", type=integer(SAMPLES), default=3, metavar="N", help="how many to show, default 3")
    parser.add_argument("--no-color", action="store_true", help="samples without colours")


def run(args: argparse.Namespace) -> int:
    overrides = [word for word in args.overrides if word != "--"]
    if options := [word for word in overrides if word.startswith("-")]:
        args.parser.error(f"unrecognized arguments: {' '.join(options)}")
    if args.config_dir is not None and not args.config_dir.is_dir():
        args.parser.error(f"argument --config-dir: expected a folder, got {str(args.config_dir)!r}")
    from ringattn.drawing import check_drawing

    if not args.no_draw:
        try:
            check_drawing(args.draw)
        except ValueError as error:
            args.parser.error(f"argument --draw: {error}")
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from ringattn.training.secrets import redacted
    from ringattn.training.start.refusal import message_of, of_a_list

    try:
        _show(args, *_composed(args, overrides))
    except (ValueError, HydraException, OmegaConfBaseException, YAMLError) as error:
        told = of_a_list(error) if isinstance(error, ValueError) else None
        print(f"error: {redacted(message_of(told or error))}", file=sys.stderr)
        return 2
    return 0


def _composed(args: argparse.Namespace, overrides: list[str]) -> "tuple[DictConfig, frozenset[str]]":
    """The configuration as `ringattn train` would have it, and the keys of the model that the user set."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from ringattn.training.config.choices import chosen_by_user

    folder, more = CONFIGS, list[str]()
    if args.config_dir is not None:
        folder, more = args.config_dir.resolve(), [f"hydra.searchpath=[file://{CONFIGS}]"]
    with initialize_config_dir(str(folder), version_base=None):
        cfg = compose(args.config_name, [*overrides, *more], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg, chosen_by_user(cfg)


def _show(args: argparse.Namespace, cfg: "DictConfig", chosen: frozenset[str]) -> None:
    from ringattn.training.data.picture import draw_data
    from ringattn.training.data.report import look_at, samples, text_of

    data = look_at(cfg, chosen)
    print(text_of(data.facts))
    for sample in samples(data, args.samples, colour=sys.stdout.isatty() and not args.no_color):
        print(f"\n{sample}")
    if not args.no_draw:
        draw_data(data.facts, Path(args.draw))
        print(f"\ndrawn: {args.draw}")
