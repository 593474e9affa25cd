"""The command line (DESIGN 5).

Verbs import what they need when they run, so that `sluice --help` and `sluice version` stay fast.  Errors are one line
each on standard error, without traces.  Exit codes: 0 done, 1 the thing asked about is not so, 2 usage or a failure;
`run` ends like kube-proxy, with 1 for every error (CFG-51).

Verbs that ask what a node's rules are stand in `proxy.questions`.

Started under the name `kube-proxy`, this is `sluice run`.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy import questions
from proxy.command_line import GoCommand, ReaderGoneError, Verbs, complain, given_flags, is_true
from proxy.config import flags
from proxy.config.errors import ConfigError

if TYPE_CHECKING:
    from proxy.config.load import Loaded

TRACEBACK = "SLUICE_TRACEBACK"
"""Environment variable: set, it shows where an internal error came from."""

KUBE_PROXY = "kube-proxy"
"""The name under which this takes kube-proxy's command line."""

_CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=Verbs, context_settings=_CONTEXT)
@click.version_option(package_name="sluice-proxy", message="sluice %(version)s")
def sluice() -> None:
    """A Kubernetes service proxy that can be read, replayed and questioned."""


@sluice.command(cls=GoCommand, flag_names=flags.BY_NAME, short_help="The agent.")
@click.pass_context
def run(ctx: click.Context, /, **params: Any) -> int:
    """The agent: watch Services and EndpointSlices, and program this node's kernel.

    Objects come from an API server, or with --manifests from a directory or a file.  A configuration file and flags
    of kube-proxy work as they do there; with --config most flags are ignored, as there.
    """
    given = given_flags(ctx, params)
    if (texts := dict(given)).get("version", "false") != "false":
        return _print_version()
    parsed = {name: flags.BY_NAME[name].type for name in texts}
    if "cleanup" in parsed and is_true(texts, "cleanup") and not texts.get("write-config-to"):
        from proxy import cleanup as verb  # noqa: PLC0415  # see the head of this module

        return min(verb.main(verb.ALL if is_true(texts, "remove-kube-proxy-rules") else verb.SLUICE), 1)
    from proxy import logs  # noqa: PLC0415  # likewise
    from proxy.config.load import load  # noqa: PLC0415  # likewise

    loaded = load(given)
    settings = loaded.settings
    logs.configure(settings.log_format, settings.verbosity)
    log = logs.get_logger("sluice.config")
    for warning in loaded.warnings:
        log.warning(warning)
    if texts.get("write-config-to"):
        return _write_config(texts["write-config-to"], loaded)
    if is_true(texts, "init-only"):
        from proxy import privileged  # noqa: PLC0415  # likewise

        privileged.set_up_or_tell(settings)
        return 0
    if settings.config:
        import signal  # noqa: PLC0415  # likewise

        # Following it begins with a look; a reload before that has nothing to do, and by default would end the process.
        signal.signal(signal.SIGHUP, lambda *_: None)
    reading = None
    if not settings.manifests and not settings.takeover:
        # Before the agent is loaded, so that both go on at once.
        from proxy.sources.credentials_reading import Reading  # noqa: PLC0415  # likewise

        reading = Reading(settings.kubeconfig, settings.master)
    from proxy import agent  # noqa: PLC0415  # likewise

    following = None
    if settings.config:
        from proxy.config.watching import Following  # noqa: PLC0415  # likewise

        following = Following(partial(load, given), loaded)
    return agent.main(settings, reading, following)


@sluice.command(short_help="A cluster in network namespaces, and its Services at work.")
def demo() -> int:
    """A cluster in network namespaces: an agent, pods, Services of every type; it probes them and shows the balance.

    It needs root, and leaves nothing behind.
    """
    from proxy import demo as verb  # noqa: PLC0415  # see the head of this module

    return verb.main()


_CONFIG_FLAGS = [name for name in flags.BY_NAME if name not in flags.ACTIONS]


@sluice.command(cls=GoCommand, flag_names=_CONFIG_FLAGS, short_help="The effective configuration.")
@click.option("--check", is_flag=True, help="print nothing, but end with 1 if it cannot be used")
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", help="how to print it [yaml]")
@click.pass_context
def config(ctx: click.Context, /, check: bool, output: str, **params: Any) -> int:
    """The effective configuration of `run` with these flags, and where each value came from.

    The YAML loads again; comments say whether a value is a default, or from a file, a flag, or the mode.
    """
    from proxy.config import printed  # noqa: PLC0415  # see the head of this module
    from proxy.config.load import load  # noqa: PLC0415  # likewise

    try:
        loaded = load(given_flags(ctx, params))
    except ConfigError as error:
        if not check:
            raise
        for problem in error.problems:
            complain(ctx.command_path, problem)
        return 1
    for warning in loaded.warnings:
        complain(ctx.command_path, warning)
    if check:
        return 0
    if output == "json":
        import json  # noqa: PLC0415  # likewise

        click.echo(json.dumps(printed.json_with_origins(loaded.merged), indent=2))
    else:
        click.echo(printed.yaml_with_origins(loaded.merged), nl=False)
    return 0


@sluice.command(short_help="Remove everything of ours.")
@click.option(
    "--of", type=click.Choice(["sluice", "kube-proxy", "all"]), default="sluice", help="whose rules [sluice's]"
)
def cleanup(of: str) -> int:
    """Remove everything of ours from the kernel, and nothing else; on request what kube-proxy has left.

    Its agent, or kube-proxy, must have ended.  Ends with 0, or 2 if something could not be removed.
    """
    from proxy import cleanup as verb  # noqa: PLC0415  # see the head of this module

    return verb.main(of)


@sluice.command(short_help="Print the version.")
def version() -> int:
    """Print the version."""
    return _print_version()


@sluice.command(short_help="A script that completes command lines.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """A script that makes a shell complete the command lines of sluice.

    For bash: `source <(sluice completion bash)`.
    """
    from proxy import completion as verb  # noqa: PLC0415  # see the head of this module

    click.echo(verb.script(sluice, shell))
    return 0


@sluice.command(short_help="The manual page.")
@click.pass_context
def man(ctx: click.Context) -> int:
    """The manual page, for `man -l -` or a file sluice.8."""
    from proxy import manual  # noqa: PLC0415  # see the head of this module

    click.echo(manual.page(sluice, ctx.find_root()), nl=False)
    return 0


for _each in questions.VERBS:
    sluice.add_command(_each)


def main(arguments: Sequence[str] | None = None, *, name: str | None = None) -> int:
    """Run a command line and give its exit code; `arguments` and `name` are the process's unless given."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    as_kube_proxy = Path(sys.argv[0] if name is None else name).name == KUBE_PROXY
    verb = "run" if as_kube_proxy else next((each for each in args if not each.startswith("-")), "")
    if arguments is None:
        _prepare_process(verb)
    shown = KUBE_PROXY if as_kube_proxy else f"sluice {verb}" if verb in sluice.commands else "sluice"
    if "_SLUICE_COMPLETE" in os.environ:
        from proxy.completion import know_shells  # noqa: PLC0415  # see the head of this module

        know_shells()
    try:
        if as_kube_proxy:
            return int(run.main(args, prog_name=KUBE_PROXY, standalone_mode=False, **_CONTEXT) or 0)
        return int(sluice.main(args, prog_name="sluice", standalone_mode=False) or 0)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ReaderGoneError:
        # The interpreter would complain about it once again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        for line in _explain(error, shown):
            complain(shown, line)
        return 1 if verb == "run" else 2


def _explain(error: Exception, command: str) -> Sequence[str]:
    """What an error says to a user, one line per problem."""
    if isinstance(error, ConfigError):
        return error.problems
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return ()
    if isinstance(error, click.ClickException):
        return [f"{error.format_message()}  (see {command} --help)"]
    if isinstance(error, OSError):
        return [_system(error)]
    if isinstance(error, ExceptionGroup):
        return list(dict.fromkeys(line for each in error.exceptions for line in _explain(each, command)))
    return [f"internal error: {type(error).__name__}: {error}  ({TRACEBACK}=1 shows where)"]


def _system(error: OSError) -> str:
    """What the system says, about what, and what to do where that is known."""
    about = error.filename
    advice = ""
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            advice = ": raise the limit of open files (ulimit -n, LimitNOFILE= of a unit)"
        case errno.ENOSPC if not about:
            about = "what this prints"
        case errno.ENOENT if not about and not _has_directory():
            about, advice = "the current directory", ": change to one that is there"
    said = error.strerror or str(error)
    return f"{about}: {said}{advice}" if about else f"{said}{advice}"


def _has_directory() -> bool:
    try:
        return bool(os.getcwd())  # noqa: PTH109  # it is the call itself that is asked about
    except OSError:
        return False


def _prepare_process(verb: str) -> None:
    """What a process of this program's own does first."""
    _have_standard_streams()
    if verb == "run":
        import signal  # noqa: PLC0415  # no other verb needs it

        # The first process of a container gets no signal that it has no handler for.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    elif verb != "demo":
        # A verb that ends soon leaves its garbage to the end: looking for it would double the time of a large dump.
        gc.disable()
        atexit.register(gc.freeze)  # and there the system takes all of it back: no look at it then either


def _have_standard_streams() -> None:
    """Open what is closed of standard input, output and error: else the next socket takes its number, and our words."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))  # noqa: SIM115, PTH123  # for good


def _write_config(path: str, loaded: Loaded) -> int:
    """Write the effective configuration as YAML that loads again (CFG-2)."""
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415  # 20 ms that nothing else here needs

    from proxy.config.printed import own  # noqa: PLC0415  # likewise

    documents = [loaded.settings.configz, *filter(None, [own(loaded.merged)])]
    try:
        Path(path).write_text("---\n".join(map(yaml.safe_dump, documents)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write-config-to {path}: {error.strerror or error}") from None
    return 0


def _print_version() -> int:
    from importlib import metadata  # noqa: PLC0415  # 20 ms that other verbs do without

    click.echo(f"sluice {metadata.version('sluice-proxy')}")
    return 0
