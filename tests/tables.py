"""Many rows of one statement in one test."""

import functools
import inspect

import pytest


def rows(names, table):
    """As ``pytest.mark.parametrize`` for a statement on pure functions, in one test, which fails with all bad rows."""
    one = isinstance(names, str)
    names = [names] if one else names
    table = list(table)

    def decorate(test):
        signature = inspect.signature(test)

        @functools.wraps(test)
        def each(*self, **fixtures):
            bad = []
            for row in table:
                try:
                    test(*self, **fixtures, **dict(zip(names, [row] if one else row, strict=True)))
                except (Exception, pytest.fail.Exception) as error:
                    bad.append((row, error))
            if bad:
                said = "\n".join(f"{row!r}: {type(error).__name__}: {error}" for row, error in bad)
                raise AssertionError(f"{len(bad)} of {len(table)} rows:\n{said}") from bad[0][1]

        left = [parameter for name, parameter in signature.parameters.items() if name not in names]
        each.__signature__ = signature.replace(parameters=left)  # what pytest is to give
        return each

    return decorate
