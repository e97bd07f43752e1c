"""Prompt sets: files of prompts, and the lists that the paper trained on."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from pathlib import Path

# Flow-GRPO's lists, which the paper trains on, at one commit of its repository.
SOURCE = "https://raw.githubusercontent.com/yifan123/flow_grpo/c7bb5fee2ef663eee08393759c8cb8a0e027f5e3/dataset"
LISTS = {
    "geneval": "geneval/train_metadata.jsonl",
    "ocr": "ocr/train.txt",
    "pickscore": "pickscore/train.txt",
}


def read(path: Path) -> list[dict]:
    """The prompts of a .txt (one a line) or .jsonl file ({"prompt": ..., ...} a line).

    Returns dicts with "prompt" and what else a line of .jsonl has. Blank lines do not count.
    Raises ValueError, naming file and line, if it cannot be read or holds no prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt or .jsonl file")
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append({"prompt": line.strip()})
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
        if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
            raise ValueError(f'{path}, line {number} has no "prompt" that is a string')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def fetch(name: str) -> Path:
    """The file of a list in LISTS, downloaded once to the user's cache.

    Its SHA-256 is kept beside it and checked at every use. Raises ValueError, saying what to do,
    without a connection and for a file that has changed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgpo"
    path = cache / LISTS[name].replace("/", "-")
    checksum = path.with_suffix(".sha256")
    if not (path.exists() and checksum.exists()):
        url = f"{SOURCE}/{LISTS[name]}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise ValueError(
                f"cannot fetch {url} ({error}); download it where there is a connection, "
                "and pass it as --train_prompts"
            ) from None
        cache.mkdir(parents=True, exist_ok=True)
        for target, data in ((path, content), (checksum, hashlib.sha256(content).hexdigest())):
            new = target.with_suffix(f".{os.getpid()}.new")
            new.write_bytes(data if isinstance(data, bytes) else data.encode())
            os.replace(new, target)
    if hashlib.sha256(path.read_bytes()).hexdigest() != checksum.read_text():
        raise ValueError(f"{path} has changed since it was fetched; delete it to fetch it again")
    return path
