"""Logs: one line per event on standard error, as aligned text or as JSON.

Loggers are named `sluice.*` (`get_logger`).  An event is a short phrase and named values, so that text stays readable
and JSON queryable.  What libraries say through the standard library's `logging` (asyncio, aiohttp) comes out in the
same form, from warnings up.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TextIO

from proxy.log_output import Output
from rules.words import one_line

if TYPE_CHECKING:
    import structlog
else:

    def _structlog() -> Any:
        """The package without its eager import of rich, which would cost the agent 5 MB and 60 ms."""
        if "rich" in sys.modules or "structlog" in sys.modules:
            return importlib.import_module("structlog")
        sys.modules["rich"] = None  # an import of it fails now, which structlog is prepared for
        try:
            return importlib.import_module("structlog")
        finally:
            del sys.modules["rich"]

    structlog = _structlog()

Format = Literal["text", "json"]

EVENTS_VERBOSITY = 4
"""From this verbosity on every single event is logged (CFG-64)."""

SYNCS_VERBOSITY = 2
"""From this verbosity on every sync is logged, and not only the first and repairs (CFG-64)."""

_LEVEL_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_DIM, _BOLD, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"

Event = MutableMapping[str, Any]


def get_logger(name: str) -> Any:
    """The logger of a part of Sluice, by its whole name: `sluice.agent`.

    It follows `configure` even when it was made before.  An event with the value `from_verbosity` is logged from that
    verbosity on; the value itself is not.
    """
    return structlog.get_logger(name)


def configure(format_: Format = "text", verbosity: int = 0, *, stream: TextIO | None = None) -> None:
    """Send logs to `stream` (standard error unless given).

    Verbosity is kube-proxy's `-v`: below 4 from level info up, as far as the event says
    no `from_verbosity` beyond it; from 4 on everything.  Colours only on a terminal.
    """
    out = sys.stderr if stream is None else stream
    output = Output(out, _tell_lost)
    structlog.configure(
        processors=[
            _up_to(verbosity),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _render_json if format_ == "json" else _TextRenderer(colours=out.isatty()),
        ],
        wrapper_class=_from_level(verbosity),
        logger_factory=lambda name="": _StreamLogger(output, name),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _Forward):
            root.removeHandler(handler)
    root.addHandler(_Forward(level=logging.WARNING))
    logging.captureWarnings(capture=True)


def warnings_alone(stream: TextIO) -> Callable[[], None]:
    """Send what is logged to `stream`, from warnings up, as structlog words it; what is returned takes that back."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    return lambda: structlog.configure(**before)


def set_verbosity(verbosity: int) -> None:
    """Tell more or less from now on, in the form and to the stream that were configured."""
    _, *others = structlog.get_config()["processors"]
    structlog.configure(wrapper_class=_from_level(verbosity), processors=[_up_to(verbosity), *others])


def _from_level(verbosity: int) -> Any:
    return structlog.make_filtering_bound_logger(logging.DEBUG if verbosity >= EVENTS_VERBOSITY else logging.INFO)


def _up_to(verbosity: int) -> Callable[[Any, str, Event], Event]:
    """Drops what is for a higher verbosity."""

    def drop(_logger: Any, _method: str, event: Event) -> Event:
        if event.pop("from_verbosity", 0) > verbosity:
            raise structlog.DropEvent
        return event

    return drop


class _StreamLogger:
    """Where structlog hands a finished line."""

    def __init__(self, output: Output, name: str) -> None:
        self.name = name
        self._output = output

    def msg(self, line: str) -> None:
        self._output.write(line)

    log = debug = info = warn = warning = error = critical = fatal = exception = failure = err = msg


def _tell_lost(lines: int) -> None:
    get_logger("sluice.log").warning("nobody took the log for a while", lost_lines=lines)


class _Forward(logging.Handler):
    """The standard library's records, into ours."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log = get_logger(record.name)
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)
        except Exception:  # noqa: BLE001  # a log that fails must not take down what it reports on
            self.handleError(record)


def _render_json(logger: _StreamLogger, _method: str, event: Event) -> str:
    ordered = {
        "time": event.pop("timestamp"),
        "level": event.pop("level"),
        "logger": logger.name,
        "event": event.pop("event"),
    }
    values = {key: str(value) if _is_text(value) else value for key, value in event.items()}
    return json.dumps({**ordered, **values}, default=str)


class _TextRenderer:
    """`TIME LEVEL LOGGER EVENT key=value ...`, the first four in columns."""

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def __call__(self, logger: _StreamLogger, _method: str, event: Event) -> str:
        time, level = event.pop("timestamp"), event.pop("level")
        text, trace = str(event.pop("event")), event.pop("exception", "")
        pairs = [f"{self._paint(_DIM, key + '=')}{_value(value)}" for key, value in event.items()]
        head = " ".join(
            (
                self._paint(_DIM, time),
                self._paint(_LEVEL_COLOURS.get(level, _BOLD), f"{level:<7}"),
                f"{logger.name:<16}",
                self._paint(_BOLD, f"{one_line(text):<32}") if pairs else one_line(text),
            )
        )
        line = " ".join((head, *pairs)).rstrip()
        return f"{line}\n{trace}" if trace else line

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_RESET}" if self._colours else text


def _value(value: object) -> str:
    """A value on one line, quoted where it would not stand alone."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return one_line(json.dumps(dict(value), default=str))
    if isinstance(value, list | tuple | set | frozenset) and not _is_text(value):
        return one_line(json.dumps(list(value), default=str))
    text = str(value)
    quoted = not text or set(text) & set(' "=\n\t')
    return one_line(json.dumps(text, ensure_ascii=False) if quoted else text)


def _is_text(value: object) -> bool:
    """Whether a value is a tuple by construction but a text to people: a key, an address with its port."""
    return isinstance(value, tuple) and type(value).__str__ is not object.__str__
