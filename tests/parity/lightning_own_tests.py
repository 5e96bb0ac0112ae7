"""Lightning's own tests with an ``EMACallback(0.9)`` in every Trainer. Run by hand:

    python tests/parity/lightning_own_tests.py path/to/lightning/tests/tests_pytorch [pytest's arguments]

The tests are not part of Lightning's package: take them from its repository, at the version that is installed. What
fails is sorted into what differs by design, below, and what is left to be looked at.
"""

from __future__ import annotations

import sys
from functools import wraps

import pytest
from lightning.pytorch import Trainer

from lightning_ema import EMACallback

BY_DESIGN = {
    "assert_called_once": "a callback more is in the list, and its hooks are called, too",
    ".callbacks)": "a callback more is in the list",
    "callbacks ==": "a callback more is in the list",
    "state_dict": "after fit the module carries the average, and files hold it",
    "allclose": "what is evaluated, saved and left in the module is the average, not the live weights",
    "val_loss": "scores are those of the average",
    "save_checkpoint": "the method is wrapped on the instance while an average is kept",
    "has nothing to average": "the module has no parameter",
    "does not work beside": "a callback beside which an average would be wrong is refused",
    "is not supported": "a strategy that cannot keep an average is refused",
}
"""What a failed assertion or an error says, and why it differs by design. A first guess: read what you count on."""


class Everywhere:
    """Puts the callback into every Trainer, and sorts what fails."""

    def __init__(self) -> None:
        self.expected: dict[str, list[str]] = {}
        self.left: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        plain = Trainer.__init__

        @wraps(plain)
        def with_average(self: Trainer, *args: object, callbacks: object = None, **kwargs: object) -> None:
            given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
            plain(self, *args, callbacks=[*given, EMACallback(0.9)], **kwargs)

        Trainer.__init__ = with_average  # type: ignore[method-assign]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            reason = next((why for said, why in BY_DESIGN.items() if said in report.longreprtext), None)
            if reason is None:
                self.left.append(report.nodeid)
            else:
                self.expected.setdefault(reason, []).append(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for reason, tests in self.expected.items():
            terminalreporter.write_line(f"by design, {len(tests)}: {reason}")
        terminalreporter.write_line(f"to be looked at, {len(self.left)}:")
        for test in self.left:
            terminalreporter.write_line(f"  {test}")


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:], plugins=[Everywhere()]))
