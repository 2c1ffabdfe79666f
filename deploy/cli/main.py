"""The command `emoe`: its parser, which is made from ServeConfig, and its exit codes.

The exit code is 0 for success, 1 where the server failed, and 2 for a mistake of the user's, which one line names.
Heavy imports wait until a verb runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import reprlib
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError, EmoeError, UserError, why
from elastic_moe.cluster.keys import with_keys
from elastic_moe.cluster.lines import meant
from elastic_moe.cluster.setting import TYPES, base_type, forms_of, has_unit, path_flag, read_yaml, with_unit
from elastic_moe.deploy.calibrating import flags as calibrating
from elastic_moe.deploy.calls import scale as cli_scale
from elastic_moe.deploy.cli import plan as cli_plan
from elastic_moe.deploy.cli import top as cli_top
from elastic_moe.deploy.cli import trace as cli_trace
from elastic_moe.deploy.joined.environment import cluster_environment, exports, haproxy_path
from elastic_moe.deploy.joined.notice import SERVICES, Cloud, asking, has_notice, run
from elastic_moe.deploy.launch.console import logged
from elastic_moe.model.checkpoints.raw import read_configuration

PLACEHOLDERS = {int: "N", float: "NUMBER", str: "TEXT"}
"""What stands for a flag's value in --help."""
SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")
"""What is written behind a flag that takes no value."""
_FIELDS = {field.name for field in dataclasses.fields(ServeConfig)}


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError for what is wrong; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("expected one argument", "expected a value"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Like argparse's, and a verb refuses what it does not know: only it knows its own flags."""
        self._check_switches(args or ())
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            self._refuse(rest)
        return parsed, rest

    def _check_switches(self, args: Sequence[str]) -> None:
        """Refuse a value of a flag that takes none. argparse would take the word behind it for another argument."""
        for flag, behind in itertools.pairwise([*args, ""]):
            name, equals, _ = flag.partition("=")
            action = self._option_string_actions.get(name)
            if action is None or action.nargs != 0:
                continue
            if equals or (behind.lower() in SWITCH_WORDS and not os.path.exists(behind)):
                forms = " or ".join(form for form in action.option_strings if form.startswith("--"))
                self.error(f"argument {name}: takes no value: write {forms} alone")

    def _refuse(self, rest: Sequence[str]) -> NoReturn:
        flag = next((argument.partition("=")[0] for argument in rest if argument.startswith("--")), None)
        if flag is None:
            self.error(f"unexpected argument: {rest[0]}; `{self.prog} --help` shows what is expected")
        for action in self._actions:
            if not action.option_strings and flag == f"--{action.dest}":
                self.error(f"unknown flag {flag}: give {action.metavar} without a flag, as `{self.prog} --help` shows")
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        self.error(f"unknown flag {flag}{meant(flag, known)}; `{self.prog} --help` lists all flags")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            text = f"expected one of {', '.join(choices)}, got {str(value)!r}{meant(str(value), choices)}"
            raise argparse.ArgumentError(action, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"emoe: error: {error}", file=sys.stderr)
        return 2
    except EmoeError as error:
        print(f"emoe: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the process that read our output has ended, as in `emoe ... | head`
        return 141


def _parser() -> Parser:
    parser = Parser(prog="emoe", description="Elastic Mixture-of-Experts serving on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"emoe {metadata.version('elastic-moe')}")
    parser.set_defaults(run=lambda _: _show_help(parser))
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=Parser)
    _add_serve(verbs)
    _add_cluster_env(verbs)
    _add_until_notice(verbs)
    cli_plan.add_parsers(verbs)
    cli_trace.add_parser(verbs)
    calibrating.add_parser(verbs)
    cli_top.add_parser(verbs)
    cli_scale.add_parser(verbs)
    return parser


def _show_help(parser: argparse.ArgumentParser) -> int:
    """What `emoe` alone does."""
    parser.print_help(sys.stderr)
    print("\nemoe: error: expected a COMMAND; `emoe serve` serves the built-in model", file=sys.stderr)
    return 2


def _add_serve(verbs: Any) -> None:
    serve = verbs.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a Mixture-of-Experts model over an HTTP API like OpenAI's. Every flag is also a key of "
        "the file that --config names; a flag overrides the file.",
        allow_abbrev=False,
    )
    serve.set_defaults(run=_serve)
    serve.add_argument("model", nargs="?", metavar="MODEL_DIR", help=_help("model"), default=argparse.SUPPRESS)
    serve.add_argument(
        "--config", metavar="FILE.yaml", type=path_flag, help="file with settings, one key for each flag"
    )
    hints = typing.get_type_hints(ServeConfig)
    for field in dataclasses.fields(ServeConfig):
        if field.name == "model":
            continue
        kind = base_type(hints[field.name])
        if kind is bool:
            serve.add_argument(
                f"--{field.name.replace('_', '-')}",
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=_help(field.name),
            )
            continue
        shown = "BYTES" if field.name.endswith("_bytes") else PLACEHOLDERS[kind]
        serve.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_scaled(field) if has_unit(field) else kind if kind is str else _number(kind),
            choices=field.metadata["choices"] or None,
            metavar=None if field.metadata["choices"] else shown,
            # absent rather than None, so that a flag that was not given does not hide the file's value
            default=argparse.SUPPRESS,
            help=_help(field.name),
        )


def _number(kind: type) -> Callable[[str], Any]:
    """Reads a number. Its range is checked with that of a file's."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {TYPES[kind]}, got {reprlib.repr(text)}") from None

    return read


def _scaled(field: dataclasses.Field[Any]) -> Callable[[str], int]:
    """Reads a number that may have a unit, such as 8GB or 32k."""

    def read(text: str) -> int:
        number = with_unit(text, of_bytes=field.name.endswith("_bytes"))
        if number is None:
            raise argparse.ArgumentTypeError(f"expected {forms_of(field)}, got {reprlib.repr(text)}")
        return number

    return read


def _add_cluster_env(verbs: Any) -> None:
    environment = verbs.add_parser(
        "cluster-env",
        help="print the environment for `ray start` on the nodes of a cluster",
        description="Print the environment in which `ray start` must run on every node, so that Ray Serve listens and "
        'answers there as it does for a server on one machine: eval "$(emoe cluster-env)"; ray start ...',
        allow_abbrev=False,
    )
    environment.set_defaults(run=lambda _: print(exports(cluster_environment(haproxy_path())), end=""))


def _add_until_notice(verbs: Any) -> None:
    notice = verbs.add_parser(
        "until-notice",
        help="run `ray start --block` on a spot machine, and drain its node when the cloud takes the machine away",
        description="Run a command, and send it SIGTERM when the cloud gives notice that it takes this machine away. "
        "`ray start --block` then drains its node for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S seconds.",
        allow_abbrev=False,
    )
    notice.add_argument("cloud", choices=[cloud.value for cloud in Cloud], help="whose notice to listen for")
    notice.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="the command to run")
    notice.set_defaults(run=_until_notice)


def _until_notice(args: argparse.Namespace) -> int:
    if not args.command:
        raise UserError("until-notice: expected a command to run, such as ray start --block --address=...")
    cloud = Cloud(args.cloud)
    ask = asking(SERVICES[cloud])
    try:
        return run(args.command, lambda: has_notice(cloud, ask))
    except OSError as error:
        raise UserError(f"until-notice: cannot run {args.command[0]}: {why(error)}") from None


def _help(name: str) -> str:
    field = next(field for field in dataclasses.fields(ServeConfig) if field.name == name)
    text = str(field.metadata["help"])
    value = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else field.default
    default = "" if value in (None, "") else f" (default: {value})"
    return (text + default).replace("%", "%%")


def _serve(args: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(args).items() if name in _FIELDS}
    data: dict[str, Any] = {}
    if args.config is not None:
        # the file is checked by itself first
        read = read_yaml(args.config)
        ServeConfig.from_mapping(read, source=str(args.config))
        data = {str(key).replace("-", "_"): value for key, value in read.items()}
    named = functools.partial(_named, args, data)
    try:
        config = with_keys(ServeConfig(**(data | flags)), os.environ)
        if config.model is not None:
            # a wrong path is named before anything heavy is imported
            read_configuration(Path(config.model).expanduser().absolute())
        from elastic_moe.actors.telemetry.exporting import check_installed
        from elastic_moe.deploy.cli.serve import serve

        check_installed(config)
        with logged(config, os.environ) as config:
            return serve(config, named)
    except ConfigError as error:
        raise ConfigError(named(str(error))) from None


def _named(args: argparse.Namespace, of_file: Collection[str], message: str) -> str:
    """A message that begins with a setting's name, so that it begins with where the user gave it: with the flag, as
    argparse writes it, or with the file. of_file: the settings that the file has."""
    name, colon, fault = message.partition(":")
    if not colon or name not in _FIELDS:
        return message
    if hasattr(args, name):
        return f"argument {'MODEL_DIR' if name == 'model' else '--' + name.replace('_', '-')}:{fault}"
    return f"{args.config}: {message}" if name in of_file else message


if __name__ == "__main__":
    sys.exit(main())
