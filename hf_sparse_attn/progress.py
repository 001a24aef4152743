"""Progress bars for long work: what a person sees; functions take any callback in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Called with a phase of the work, how many of its steps are done, how many there are, and the step that begins ("" at
# the end, or where steps have no names).
Progress = Callable[[str, int, int, str], None]


def silent(phase: str, done: int, total: int, step: str = "") -> None:
    """A `Progress` that shows nothing."""


def counted(progress: Progress, phase: str) -> Callable[[list[Any]], Iterable[Any]]:
    """Wrap the iteration over a list so that `progress` is told of each item."""

    def wrap(items: list[Any]) -> Iterator[Any]:
        for done, item in enumerate(items):
            progress(phase, done, len(items), "")
            yield item
        progress(phase, len(items), len(items), "")

    return wrap


class ProgressBars:
    """A `Progress` that shows one bar after the other on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int, step: str = "") -> None:
        from tqdm import tqdm

        if self._bar is None or self._bar.desc != phase:
            self.close()
            self._bar = tqdm(total=total, desc=phase)
        self._bar.set_postfix_str(step, refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
        if done == total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is now."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
