"""Running what may raise anything at all."""

from __future__ import annotations

from types import TracebackType


class Outcome:
    """What became of a block of foreign code: nothing that it raises gets out, `SystemExit` neither."""

    error: BaseException | None = None
    message = ""

    def __enter__(self) -> Outcome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        if error is not None:
            self.message = " ".join(str(argument)[:200] for argument in error.args[:2] if isinstance(argument, str))
        return True
