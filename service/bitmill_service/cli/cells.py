"""Shows the cells of a sweep while they run: one table on a terminal, plain lines otherwise.

Where the terminal has too few lines, cells that wait are left out first, then those that ended long
ago. A plain line comes whenever a cell has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bitmill.reporting.sweep_table import SweepRow
from bitmill_service.schemas import CellView, SweepEventView, SweepView
from bitmill_service.units import format_size
from bitmill_workers.store.states import TERMINAL

_AROUND = 3
"""Lines of a terminal that are no cell's: the counts, the head, the cursor's."""


class CellsWatch:
    """Feed it a sweep and its events; use it as a context manager."""

    def __init__(self, view: SweepView, console: Console) -> None:
        self._console, self._axes = console, view.axes
        self._cells: dict[int, CellView] = {}
        self._ended: list[int] = []
        self._now: dict[int, tuple[str, str]] = {}
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(self, console=console, refresh_per_second=4)
        self.renew(view)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def renew(self, view: SweepView) -> bool:
        """Show cells as the service has them now; whether any has ended since."""
        before = len(self._ended)
        for cell in view.cells or ():
            known = self._cells.get(cell.cell)
            if known is not None and known.job_id != cell.job_id and cell.cell in self._ended:
                self._ended.remove(cell.cell)  # it was retried
                before -= 1
            self._cells[cell.cell] = cell
            told = _counted(cell.progress.model_dump()) if cell.progress else cell.stage or ""
            self._now[cell.cell] = (cell.state, told)
            if cell.state in TERMINAL and cell.cell not in self._ended:
                self._ended.append(cell.cell)
                if self._live is None:
                    self._line(ended(cell.row, len(view.cells or ())))
        return len(self._ended) > before

    def on_event(self, event: SweepEventView) -> bool:
        """Show an event; whether the sweep is to be asked for, because a job of it has ended.

        What a job that was superseded, or has ended, did before says nothing.
        """
        cell, state = self._cells[event.cell], event.data.get("state")
        if event.job_id != cell.job_id:
            return event.job_id > (cell.job_id or "")
        if event.cell in self._ended:
            return False
        if event.kind == "state":
            self._now[event.cell] = (str(state), "")
            return state in TERMINAL
        if event.kind == "progress":
            self._now[event.cell] = (self._now[event.cell][0], _counted(event.data))
        return False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        counts = Counter(state for state, _ in self._now.values())
        yield Text(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("cell", *self._axes, "state", ""):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for number in self._shown(max(1, (options.height or console.height) - _AROUND)):
            row, (state, doing) = self._cells[number].row, self._now[number]
            told = found(row) if number in self._ended else doing
            table.add_row(str(number), *map(Text, row.axes.values()), state, Text(told))
        yield table

    def _shown(self, lines: int) -> list[int]:
        """The cells that there are lines for, in the grid's order: what waits goes first, then
        what ended long ago."""
        waits = [n for n, (state, _) in self._now.items() if state in ("queued", "deleted")]
        runs = [n for n in self._now if n not in waits and n not in self._ended]
        return sorted([*runs, *self._ended[::-1], *waits][:lines])

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def ended(row: SweepRow, of: int) -> str:
    """A cell that has ended, in one line."""
    told = found(row)
    return f"cell {row.cell} of {of} {row.state}" + (f": {told}" if told else "")


def found(row: SweepRow) -> str:
    """What a cell has found in short: size and perplexity on the first text, or its error."""
    told = []
    if row.quality is not None and row.quality.size is not None:
        text, measured = next(iter(row.quality.texts.items()), ("", None))
        told.append(format_size(row.quality.size))
        if measured:
            told.append(f"perplexity {measured.perplexity:.2f} on {text}")
    return row.error or ", ".join(told)


def _counted(progress: Mapping[str, Any]) -> str:
    unit = progress.get("unit") or ""
    return f"{progress['stage']} {progress['done']}/{progress['total']} {unit}".rstrip()
