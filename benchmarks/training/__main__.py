"""Measures what the command line asks for: see `benchmarks.training`."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from benchmarks.training.alst import forget_exchange
from benchmarks.training.attempts import attempt_apart, attempt_here, end_without_room, gpu_room
from benchmarks.training.case import Case, Place, kernel_spec, model_config
from benchmarks.training.floor import Floor, measure_floor
from benchmarks.training.kernel import measured_kernel
from benchmarks.training.longest import Attempt, Longest, find_longest
from benchmarks.training.measuring import Result, is_lack_of_room, measure
from benchmarks.training.options import case_of, checked, lengths, parser
from benchmarks.training.peer_attention import PeerAttention
from benchmarks.training.profiling import profile_step, profile_table
from benchmarks.training.report import facts_of, longest_table, markdown, table_of, write_json
from benchmarks.training.rows import Row, Tools
from ringattn import init_mesh
from ringattn.training.start.launched import current, pick_device


class Bench:
    """What was measured so far, written down after every row. Collective, but for what is written."""

    def __init__(self, options: argparse.Namespace, place: Place, tools: Tools) -> None:
        self.options, self.place, self.tools = options, place, tools
        layers = model_config(options.model, options.layers).num_hidden_layers
        self.facts = facts_of(
            place.device, place.ranks, tools.kernel.real.name, f"{options.model} with {layers} layers"
        )  # fmt: skip
        self.facts["room"] = gpu_room(place.device, options.room)
        self.results: list[Result] = []
        self.searches: dict[str, Longest] = {}
        self._profiles: list[str] = []

    def run(self) -> None:
        """Every length with every row, or the search of every row."""
        rows = self.options.rows.split(",")
        if self.options.longest:
            for row in rows:
                self.searches[row] = search(self.options, row, self._attempt)
                self.note(longest_table({row: self.searches[row]})[-1])
            return
        for tokens in lengths(self.options):
            floor = self.floor_of(case_of(self.options, rows[0], tokens, self.place))
            for row in rows:
                case = case_of(self.options, row, tokens, self.place)
                for dry in {None: [False], "only": [True], "also": [True, False]}[self.options.dry_attention]:
                    self.measure_row(replace(case, dry=dry), floor)

    def _attempt(self, row: str, tokens: int) -> Attempt:
        return attempt_here(self.options, row, tokens, self.place, self.tools)

    def floor_of(self, case: Case) -> Floor | None:
        if not self.options.floor:
            return None
        floor = measure_floor(case, self.place, self.tools.kernel)
        self.facts.setdefault("floors", {})[str(case.docs.total)] = vars(floor) | {"seconds": floor.seconds}
        self.note(
            f"floor of {case.docs.total:,} tokens: {floor.seconds:.3f} s (attention {floor.forward:.3f} forward and "
            f"{floor.backward:.3f} backward, products {floor.layers:.3f} at {floor.rate / 1e12:.0f} TFLOP/s, head "
            f"{floor.head:.3f})"
        )
        return floor

    def measure_row(self, case: Case, floor: Floor | None) -> None:
        profiled = None if self.options.profile is None else self.profile_of(case)
        result = measure(case, self.place, self.tools, profiled)
        if floor is not None and result.seconds is not None and result.update is not None and not case.dry:
            result.floor, result.share = floor.seconds, floor.seconds / (result.seconds - result.update)
        if result.left is not None and result.left > 0.05:
            self.note(f"{result.left:.2f} GiB of the GPU were held before {case.row} was built, and count in its peak")
        self.results.append(result)
        self.note(table_of([result])[-1])

    def profile_of(self, case: Case) -> Callable[[Row], None]:
        def profile(row: Row) -> None:
            events, milliseconds = profile_step(row, self.place.device)
            kind = ", dry attention" if case.dry else ""
            self._profiles += profile_table(f"{case.row}, {case.docs.total:,} tokens{kind}", events, milliseconds)

        return profile

    def note(self, line: str) -> None:
        """Says what is new, and writes all of it."""
        if self.place.rank == 0:
            print(line, flush=True)
            self.write()

    def write(self) -> None:
        if self.options.json is not None:
            write_json(self.options.json, self.facts, self.results, self.searches)
        if self.options.profile is not None:
            text = markdown(self.facts, self.results, {}) + "\n" + "\n".join(self._profiles)
            self.options.profile.write_text(text, encoding="utf-8")

    def report(self) -> None:
        if self.place.rank == 0:
            self.write()
            print("\n" + markdown(self.facts, self.results, self.searches), flush=True)


def search(options: argparse.Namespace, row: str, attempt: Callable[[str, int], Attempt]) -> Longest:
    """The longest stream of a row. Every attempt is printed: a search may be cut short."""

    def told(tokens: int) -> Attempt:
        found = attempt(row, tokens)
        result = found.failure or f"{found.peak:.2f} of {found.room:.2f} GiB"
        print(f"{row}, {tokens:,} tokens: {result}, in {found.seconds:.0f} s", flush=True)
        return found

    return find_longest(told, lengths(options)[0], options.precision, options.limit)


def search_apart(options: argparse.Namespace) -> dict[str, Longest]:
    """Searches whose attempts are runs of several ranks. This process touches no GPU."""
    searches: dict[str, Longest] = {}
    for row in options.rows.split(","):
        searches[row] = search(options, row, lambda row, tokens: attempt_apart(options, row, tokens))
        if options.json is not None:
            write_json(options.json, {"command": " ".join(sys.argv)}, [], searches)
    print("\n" + "\n".join(longest_table(searches)), flush=True)
    return searches


@contextmanager
def started(options: argparse.Namespace) -> Iterator[Bench]:
    """This rank, with its kernel, among the others."""
    launch = current()
    device = torch.device("cpu") if options.device == "cpu" else pick_device(launch)
    if options.device == "cuda" and device.type != "cuda":
        raise ValueError("--device=cuda: torch finds no GPU")
    mesh = init_mesh(ulysses=options.ulysses, device_type=device.type)
    config, dtype = model_config(options.model, options.layers), getattr(torch, options.dtype)
    with measured_kernel(kernel_spec(config, device, dtype), options.kernel) as kernel:
        tools = Tools(kernel, PeerAttention(kernel))
        with tools.attention.registered():
            try:
                yield Bench(options, Place(mesh, device), tools)
            finally:
                forget_exchange(tools)


def main(arguments: list[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(arguments)
    try:
        checked(options)
    except ValueError as error:
        made.error(str(error))
    if options.gpus > 1:
        search_apart(options)
        return
    quiet_libraries()
    with started(options) as bench:
        try:
            bench.run()
        except (RuntimeError, MemoryError) as error:
            if bench.place.ranks == 1 or not is_lack_of_room(error):
                raise
            end_without_room(error, options.json, bench.facts)
        bench.report()
    dist.destroy_process_group()


def quiet_libraries() -> None:
    """Libraries speak of errors only: a run of many rows would repeat their advice at every one."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    main()
