"""What a person sees while a model trains: a bar in a terminal, plain lines in a log."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10  # between two lines of a log


class TrainingProgress:
    """A context manager: `update` after each step, `note` for a line that stays."""

    def __init__(self, steps: int, quiet: bool = False):
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.steps, self.begun, self.last_line = steps, time.monotonic(), 0.0
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, loss="-", speed="-")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        self.bar.update(self.task, completed=step, loss=f"{loss:.3f}", speed=f"{tokens_per_second:,.0f}")
        now = time.monotonic()
        if self.bar.disable and (now - self.last_line > LINE_SECONDS or step == self.steps):
            self.last_line = now
            minutes, seconds = divmod(round((now - self.begun) / step * (self.steps - step)), 60)
            self.note(
                f"step {step}/{self.steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
                f"{minutes}:{seconds:02} left"
            )
