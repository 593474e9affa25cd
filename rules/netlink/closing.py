"""What is closed at the end of its `with` block."""

from __future__ import annotations

import abc
from typing import Self


class Closing(abc.ABC):
    """Something to be closed, by `close` or by leaving its `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what it holds."""
