"""A mean teacher from a YAML file: ``python examples/cli.py fit --config examples/mean_teacher.yaml``."""

from importlib import import_module

from digits import Digits
from lightning.pytorch.cli import LightningCLI

MeanTeacher = import_module("02_mean_teacher").MeanTeacher  # a name that `import` cannot spell


def main(arguments=None):
    LightningCLI(MeanTeacher, Digits, args=arguments)


if __name__ == "__main__":
    main()
