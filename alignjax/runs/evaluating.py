"""How far the evaluation at the end of a run is, and its end if a signal arrives."""

import contextlib
from collections.abc import Callable, Iterator

from alignjax.machine import console
from alignjax.machine.signals import Signals

PATIENCE = 5.0  # seconds that an evaluation may take without a progress bar


class EvaluationProgress:
    """Shows the progress of a run's last evaluation, and stops it after a signal."""

    def __init__(self, name: str, signals: Signals):
        self.name = name
        self.signals = signals

    @contextlib.contextmanager
    def __call__(self, batches: int) -> Iterator[Callable[[], None]]:
        """Show a bar of so many batches; the body calls what it is given after each of them.

        The call raises Stopped if a signal has arrived. The trained parameters are saved by then,
        so the same command needs only to evaluate.
        """
        label = f"{self.name}: evaluating"
        with console.progress_bar(batches, label, "batch", leave=False, delay=PATIENCE) as bar:

            def advance() -> None:
                bar.update()
                if self.signals.received_anywhere():
                    raise self.signals.stopped(
                        f"{self.name} is trained but not evaluated; the same command evaluates it"
                    )

            yield advance
