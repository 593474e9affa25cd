"""What is raised about configuration."""

from __future__ import annotations


class ConfigError(Exception):
    """The configuration cannot be used; `problems` says why, one line each, naming the option or the file's line."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
