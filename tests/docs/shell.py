"""Command lines of the pages: taken apart, checked against the programs, run if that is quick."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
from click.testing import CliRunner, Result
from starlette.testclient import TestClient

from llama_export.cli import main as llama_export
from llama_export.precisions import choose_precision
from llama_runtime.cli import cli as llama_run
from tests.docs.pages import ROOT

PROGRAMS = {"llama-run": llama_run, "llama-export": llama_export}
# Programs that aren't ours: nothing of them is checked.
OTHERS = {"cat", "cd", "docker", "echo", "export", "git", "ray", "source", "split", "zcat"}
# What commands need that tests haven't, or shouldn't take.
NEVER = {
    "build": "builds take long, and have tests of their own",
    "verify": "so does this",
    "engine": "needs TensorRT",
    "serve": "serves until it is told to end",
    "bench": "measures",
    "eval": "takes a second, and docs/quality.md does the same in Python",
}
OPTIONS_NEVER = {
    "--ray": "needs a cluster",
    "--workers": "starts processes",
    "--devices": "needs a GPU",
}


@dataclass
class Command:
    """One program with its arguments.

    Attributes:
        words: the program and its arguments.
        given: the program before it in a pipe, or None.
        redirected: files behind ``<`` and ``>``.
    """

    words: list[str]
    given: Command | None
    redirected: dict[str, str]

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def args(self) -> list[str]:
        return self.words[1:]


def commands(text: str) -> list[Command]:
    """The commands of a block, in order; what goes over the end of a line is one command."""
    found: list[Command] = []
    line = ""
    for piece in text.splitlines():
        line += piece
        if line.endswith("\\"):
            line = line[:-1]
            continue
        try:
            words = list(_lexer(line))
        except ValueError:  # a quotation goes on
            line += "\n"
            continue
        line = ""
        found += _pipes(words)
    if line:
        raise ValueError(f"the block ends within a command: {line!r}")
    return found


def _lexer(line: str) -> shlex.shlex:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    return lexer


def _pipes(words: list[str]) -> list[Command]:
    found: list[Command] = []
    current = Command([], None, {})
    places = iter(words)
    for word in places:
        if word in ("<", ">"):
            current.redirected[word] = next(places)
        elif word in ("|", "&", "&&", ";"):
            found.append(current)
            current = Command([], current if word == "|" else None, {})
        else:
            current.words.append(word)
    return [command for command in (*found, current) if command.words]


def check(command: Command) -> None:
    """Fail unless the program would understand its arguments.

    Raises:
        ValueError: says what is wrong.
    """
    program, args = command.program, command.args
    if program in PROGRAMS:
        parsed(program, args)
    elif program.startswith("scripts/"):
        check_script(program, args)
    elif program == "pip":
        for name in args[1:]:
            _check_package(name)
    elif program in ("python", "uvicorn"):
        if program == "python" and not (ROOT / args[0]).is_file():
            raise ValueError(f"there is no {args[0]}")
    elif program != "curl" and program not in OTHERS:
        raise ValueError(f"{program} is no program that the tests know")


def parsed(program: str, args: list[str]) -> click.Context:
    """What click makes of the arguments."""
    group = PROGRAMS[program]
    if args[0].startswith("-"):
        return group.make_context(program, [*args, "plan"], resilient_parsing=True)
    if args[0] not in group.commands:
        raise ValueError(f"{program} has no command {args[0]}")
    try:
        parent = click.Context(group, info_name=program, **group.context_settings)
        context = group.commands[args[0]].make_context(args[0], args[1:], parent=parent)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
    if args[0] == "build":
        given = context.params
        block = None if given["block"] is None else int(given["block"])
        calibrated = not given["no_calibration"]
        choose_precision(
            given["target"], given["precision"], given["kv_cache"], block, calibrated=calibrated
        )
    return context


def check_script(path: str, args: list[str]) -> None:
    """A script exists, and it or what it imports has each option."""
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no {path}")
    known = script_options(ROOT / path, set())
    for arg in args:
        option = arg.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise ValueError(f"{path} has no {option}: it is in no source of it")


def script_options(path: Path, seen: set[Path]) -> set[str]:
    """What a script reads as options, and the scripts that it runs or imports.

    Args:
        path: of the script.
        seen: those that were looked at, to which this one is added.
    """
    if path in seen or not path.is_file():
        return set()
    seen.add(path)
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"\bscripts\.([\w.]+)", text)
    names += re.findall(r"scripts/([\w/]+)\.py", text)
    others = [ROOT / "scripts" / f"{name.replace('.', '/')}.py" for name in names]
    if path.suffix == ".py":
        found = set(re.findall(r'"(--[a-z][\w-]*)"', text))
    else:  # bash: whatever stands outside of comments
        code = re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE)
        found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
    return found.union(*(script_options(other, seen) for other in others))


def _check_package(name: str) -> None:
    match = re.fullmatch(r"llama-caravan(?:\[([\w,-]+)\])?", name)
    if match is None:
        if name.startswith(("-", "https://")):
            return
        raise ValueError(f"{name} is not our package")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unknown = set((match[1] or "").split(",")) - {"", *project["optional-dependencies"]}
    if unknown:
        raise ValueError(f"there is no extra {', '.join(unknown)}")


def unrun_because(command: Command) -> str | None:
    """Why a command of ours isn't run here; None if it is."""
    name, args = command.args[0], command.args[1:]
    if name in NEVER:
        return NEVER[name]
    for option, reason in OPTIONS_NEVER.items():
        if option in args:
            return reason
    bundle = args[args.index("--bundle") + 1] if "--bundle" in args else "bundle"
    if command.program == "llama-run" and Path(bundle) != Path("bundle"):
        return "a bundle that isn't here"
    return None


def run(command: Command, stdin: str | None = None) -> Result:
    """Run one of our commands in this process and folder."""
    given = command.given
    data = b"Hello\n" if stdin is None else stdin.encode()
    if given is not None and given.program == "echo":
        data = " ".join(given.args).encode() + b"\n"
    elif given is not None and given.program == "zcat":
        found = sorted(Path().glob(given.args[0]))
        assert found, given.args
        data = b"".join(gzip.decompress(path.read_bytes()) for path in found)
    elif given is not None:
        raise ValueError(f"the tests can't pipe {given.program} into anything")
    if "<" in command.redirected:
        data = Path(command.redirected["<"]).read_bytes()
    args = [str(Path(arg).expanduser()) if arg.startswith("~") else arg for arg in command.args]
    program = PROGRAMS[command.program]
    return CliRunner().invoke(program, args, input=data, prog_name=command.program)


def ask(command: Command, client: TestClient) -> None:
    """Send what curl would send to the server of the page."""
    args = iter(command.args)
    url, body, headers = "", None, {}
    for arg in args:
        if arg in ("-H", "--header"):
            name, _, value = next(args).partition(": ")
            headers[name] = value
        elif arg in ("-d", "--data"):
            body = next(args)
        elif arg.startswith("http://127.0.0.1:8000/"):
            url = arg.removeprefix("http://127.0.0.1:8000")
        else:
            raise ValueError(f"the tests don't know curl's {arg}")
    if body is not None:
        json.loads(body)
    answer = client.request("GET" if body is None else "POST", url, content=body, headers=headers)
    if answer.status_code != 200:
        raise ValueError(f"{answer.status_code}: {answer.text}")
