"""The command line: ``python -m lightning_ema inspect | export | import | synthesize | recommend | plot-schedule``."""

from __future__ import annotations

import argparse
import pickle
import sys

from lightning_ema.cli import import_file, plot, recommend, synthesize
from lightning_ema.files.text import printable
from lightning_ema.interop.export import describe, export_average


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_ema", description="Averages in files.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what a checkpoint holds")
    inspect.set_defaults(run=lambda given: describe(given.file, given.trust))
    export = commands.add_parser("export", help="write the averaged weights of a checkpoint alone")
    export.set_defaults(
        run=lambda given: export_average(given.file, given.out, name=given.name, which=given.which, trust=given.trust)
    )
    for command in (inspect, export):
        command.add_argument("file", help="a checkpoint: a file, or a folder of shards")
        command.add_argument("--trust", action="store_true", help="let the file run code while it is read")
    export.add_argument("out", help="a .safetensors or .pt file")
    export.add_argument("--name", default="ema", help="of the callback (default: ema)")
    export.add_argument("--which", type=int, help="place among several averages (default: the one that was evaluated)")
    import_file.add_to(commands)
    synthesize.add_to(commands)
    recommend.add_to(commands)
    plot.add_to(commands)
    given = parser.parse_args(arguments)
    try:
        print(printable(str(given.run(given))))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    except pickle.UnpicklingError:
        print(
            printable(
                f"error: {given.file} holds objects of classes that torch does not load from files it should not "
                "trust (often hyper-parameters). If you trust who wrote it, add --trust."
            ),
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
