"""Write one HTML page about a training run: curves, memory, the plan, data, what went wrong, versions.

    ringattn report outputs/tiny-stdlib
    ringattn report outputs/tiny-stdlib -o /tmp/tiny.html

The page needs no other file and no network. It can be written at any time, also of a run that is not done
or has failed; what the folder does not hold is left out. `ringattn train run.report=true` writes it at the end.
"""

import argparse

from ringattn.commands._files import check_target, file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=file, metavar="RUN", help="folder of a run: its run.output")
    parser.add_argument("-o", "--output", type=file, metavar="FILE", help="default: RUN/report.html")


def run(args: argparse.Namespace) -> int:
    from ringattn.training.page.write import write_page

    try:
        if args.output is not None:
            check_target("--output", args.output)
        print(write_page(args.folder, args.output))
    except ValueError as error:
        args.parser.error(str(error))
    return 0
