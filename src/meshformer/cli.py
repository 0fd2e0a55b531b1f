"""The command `meshformer`: plan, train, evaluate, generate, convert, export, runs, profile, report, doctor.

All checks run before a folder is made or a process is started, without importing torch.

Exit codes: 0 done, 1 a job failed, 2 a mistake in the command or configuration, 75 preempted and saved, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from meshformer.printing import escape_unencodable, say

COMMANDS = ("plan", "train", "evaluate", "generate", "convert", "export", "runs", "profile", "report", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    escape_unencodable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    from meshformer.config.errors import ConfigError, Stopped

    try:
        return _dispatch(arguments)
    except ConfigError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        say(f"error: {error}", error=True, one_line=True)
        return 2
    except Stopped as stopped:
        say(stopped, error=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return 130
    except BrokenPipeError:  # `meshformer --help | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        # An unexpected failure needs a traceback: that of the worker if one failed, since the parent was only waiting.
        details = getattr(error, "details", None)
        say(traceback.format_exc() if details is None else details, error=True, end="")
        say(f"error: {type(error).__name__}: {error}" if details is None else f"error: {error}", error=True)
        return 1


def _dispatch(arguments: list[str]) -> int:
    from meshformer.config.errors import ConfigError
    from meshformer.config.suggest import did_you_mean

    completing = bool({"-sc", "--shell-completion"} & set(arguments))
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if command is None and completing:
        command = _command_being_completed(arguments)
        if command is None:
            return 0
        arguments = [command, *arguments]
    if command is None:
        if not arguments or {"-h", "--help"} & set(arguments[:1]):
            from meshformer.command.helptext import overview

            say(overview())
            return 0
        if arguments[0] == "--version":
            from importlib.metadata import version

            say(version("meshformer"))
            return 0
        raise ConfigError(
            f"there is no command {arguments[0]!r}", fix=f"{did_you_mean(arguments[0], COMMANDS)} `meshformer --help` lists them."
        )
    if {"-h", "--help"} & set(arguments):
        from meshformer.command.helptext import help_of

        say(help_of(command, _config_dir(arguments)))
        return 0
    if command == "doctor":
        if arguments[1:]:
            raise ConfigError("doctor takes no settings", arguments[1], fix="Leave it out.")
        from meshformer.command.doctor import doctor

        return doctor()
    if command in ("runs", "report"):
        if completing:
            return 0
        from meshformer.command.runs import run_records

        return run_records(command, arguments[1:])
    if command == "plan":
        if completing:
            return 0
        from meshformer.command.plan import run_plan

        return run_plan(arguments[1:])
    if command == "profile":
        if completing:
            return 0
        from meshformer.command.profile import profile

        return profile(arguments[1:])
    from meshformer.command.jobs import run_command

    return run_command(command, arguments[1:])


def _config_dir(arguments: list[str]) -> str | None:
    """The last --config-dir of the command line, which `--help` reads without Hydra's parser."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            found = value if equals else following
    return found


def _command_being_completed(arguments: list[str]) -> str | None:
    """Return the subcommand of the line being completed and remove it from COMP_LINE, where Hydra expects only overrides.

    Returns None after printing completions for the subcommand itself.
    """
    line = os.environ.get("COMP_LINE")
    if line is None:  # completion is being installed or removed, which works with any subcommand's configuration
        return "train"
    program, _, rest = line.lstrip().partition(" ")
    word, space, tail = rest.lstrip().partition(" ")
    if word in COMMANDS and space:
        os.environ["COMP_LINE"] = f"{program} {tail}"
        return word
    say(" ".join(name for name in COMMANDS if name.startswith(word)))
    return None


if __name__ == "__main__":
    sys.exit(main())
