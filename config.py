"""The file of --config: a run's arguments in YAML or JSON, read and written.

yaml is imported where it is used, so that a wrong flag is answered also where it is missing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cli
from cli import Fault, first_line

NULL = ("", "~", "null")  # YAML's words, and what stands before the name of a flag for them
SWITCH = {"true": "--", "yes": "--", "on": "--", "false": "--no_", "no": "--no_", "off": "--no_"}


def read_config(path: str, arguments: type) -> list[str]:
    """A YAML or JSON file's arguments, as a command line has them. Raises Fault, with the line."""
    import yaml

    def fault(mark: Any, what: str) -> Fault:
        return Fault(f"argument --config: {path}, line {mark.line + 1}: {what}")

    try:
        if not Path(path).is_file():
            raise OSError("it is no file")
        text = Path(path).read_bytes().decode("utf-8-sig")
        text = text.expandtabs() if path.endswith(".json") else text
        tree = yaml.compose(text, yaml.BaseLoader)  # all as it is written: `no` may be a word
    except yaml.MarkedYAMLError as error:
        raise fault(error.problem_mark, f"this is not YAML ({error.problem})") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise Fault(f"argument --config: cannot read {path} ({first_line(error)})") from None
    if not isinstance(tree, yaml.MappingNode):
        raise Fault(f"argument --config: {path} must have a line 'argument: value' for each")

    fields = {}
    for field in dataclasses.fields(arguments):
        for name in (field.name, *field.metadata["aliases"]):
            fields[name.removeprefix("--")] = field
    found: dict[str, list[str]] = {}
    for key, node in tree.value:
        field = fields.get(str(key.value).replace("-", "_"))
        if not field:
            name = key.value if isinstance(key, yaml.ScalarNode) else "of that kind"
            raise fault(key.start_mark, f"there is no argument {name}")
        name, many = field.name, field.default_factory is not dataclasses.MISSING
        if name in found:
            raise fault(key.start_mark, f"{name} is there already")
        if name == "config" and node.value not in NULL:
            raise fault(key.start_mark, "a file of --config cannot name another one")
        nodes = node.value if many and isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(value, yaml.ScalarNode) for value in nodes):
            needed = "values, and no list in a list" if many else "one value"
            raise fault(node.start_mark, f"{name} takes {needed}")
        words = [value.value for value in nodes]
        if nodes == [node] and node.style is None and words[0].lower() in NULL:
            words = []
        if field.type == "bool" and words and words[0].lower() not in SWITCH:
            raise fault(node.start_mark, f"{name} must be true or false, got {words[0]}")
        if many and any(word.startswith("-") for word in words):
            raise fault(node.start_mark, f"{name} takes no value that begins with -")
        if field.type == "bool":
            found[name] = [SWITCH[word.lower()] + name for word in words]
        elif many and words:
            found[name] = [f"--{name}", *words]
        else:  # nothing at all where the value is null, or is an empty list
            found[name] = [f"--{name}={word}" for word in words]
    return [word for words in found.values() for word in words]


def parse_with_config(arguments: type, argv: list[str]) -> Any:
    """As `cli.parse`, after what the file of --config says. The command line wins."""
    args = cli.parse(arguments, argv)
    if args.config is None:
        return args
    line = read_config(args.config, arguments)
    try:
        return cli.parse(arguments, [*line, *argv])
    except Fault as fault:
        raise Fault(f"{args.config}: {fault}") from None


def as_config(args: Any) -> str:
    """The trainer's arguments as such a file."""
    import yaml

    settings = {**dataclasses.asdict(args), "config": None, "print_arguments": False}
    settings["micro_batch_size"] = int(args.micro_batch_size) or "auto"
    return yaml.safe_dump(settings, sort_keys=False)
