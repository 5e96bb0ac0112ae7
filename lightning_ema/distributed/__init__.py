"""Which part of a tensor lies in this process: :mod:`base` says what is asked, each other way of cutting is a file."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):  # each registers itself with `base`: a further one needs no line here
    import_module(f"{__name__}.{_file.name}")
