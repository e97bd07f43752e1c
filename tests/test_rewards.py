"""The rewards' interface, names and weights, and each reward on models built here."""

import builtins
import copy
import gc
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, CLIPModel, CLIPProcessor

import cli
import rewards

OWN = f"{Path(__file__).parent}/own_rewards.py"
PROMPTS = [{"prompt": text} for text in ("a red circle", "two blue squares", "a green triangle")]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def test_names_are_the_files():
    assert {"pickscore", "compressibility"} <= set(rewards.names())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pickscore", ("pickscore", 1.0)),
        ("pickscore=0.8", ("pickscore", 0.8)),
        ("pickscore=-2", ("pickscore", -2.0)),
        (f"{OWN}:brightness", (f"{OWN}:brightness", 1.0)),
        (f"{OWN}:brightness=3", (f"{OWN}:brightness", 3.0)),
        ("shapes:strict", ("shapes:strict", 1.0)),
    ],
)
def test_a_spec_is_a_name_and_a_weight(spec, expected):
    assert rewards.parse(spec) == expected


@pytest.mark.parametrize("name", [f"{OWN}:brightness", "own_rewards:brightness"])
def test_own_rewards_by_file_and_by_package(name, images, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert rewards.parse(name)
    reward = rewards.load(name, "cpu")
    assert torch.allclose(rewards.score(name, reward, images, PROMPTS), images.mean((1, 2, 3)))


def test_helpers_beside_the_rewards_are_no_rewards(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("import torch\n\n\ndef load(device, model=None):\n    pass\n")
    (tmp_path / "helper.py").write_text("def convert(file):\n    pass\n")
    monkeypatch.setattr(rewards, "__file__", str(tmp_path / "__init__.py"))
    assert rewards.names() == ["one"]


@pytest.fixture
def own(tmp_path):
    """Writes a file with a reward f, or another, and gives its name as a reward."""

    def write(source, function="f", folder="own"):
        file = tmp_path / folder / "mine.py"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(source if isinstance(source, bytes) else source.encode())
        return f"{file}:{function}"

    path, modules = list(sys.path), set(sys.modules)
    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("reward_") or name in ("beside", "later", "mine"):
            del sys.modules[name]


REFUSED = {  # as it is read: the file's source, and the line
    "def g(images, prompts): return f2": r"own/mine.py defines no function f$",
    "def f(images, prompts)\n": r"own/mine.py:f': SyntaxError: expected ':' .mine.py, line 1.$",
    "x = 1\n  f = 2": "IndentationError: unexpected indent .mine.py, line 2.$",
    "return f": "SyntaxError: 'return' outside function",
    "f = '\0'": "null bytes$",
    b"f = '\xff'": "SyntaxError: .*utf-8",
    "f = " + "(" * 400 + ")" * 400: "too many nested parentheses",
}


@pytest.mark.parametrize("source", REFUSED, ids=range(len(REFUSED)))
def test_a_file_that_cannot_have_the_reward_is_refused_unrun(source, own):
    name = own(source)
    with pytest.raises(rewards.RewardError, match=REFUSED[source]) as caught:
        rewards.parse(name)
    assert str(caught.value).startswith(repr(name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic", "no reward 'magic': give aesthetic, "),
        ("pickscore=", "the weight must be a number, got ''"),
        ("pickscore=0", "'pickscore=0': a weight of 0 trains nothing; --eval_reward watches it"),
        ("pickscore=nan", "the weight must be a number, got 'nan'"),
        ("pickscore=1e-300", "the weight must be 1e-9 to 1e9 in size, got 1e-300"),
        ("pickscore=-1e38", "the weight must be 1e-9 to 1e9 in size, got -1e38"),
        ("pickscore:0.5", "'pickscore:0.5': a weight follows an equals sign: give pickscore=0.5"),
        ("nowhere.py:f", "'nowhere.py:f': there is no file nowhere.py"),
        ("x" * 5000 + ".py:f", "OSError: .* File name too long"),
        (f"{Path(__file__).parent}:f", "there is no package .*; the name of a file ends in .py"),
        (":f", "there is no package ;"),
        ("..:f", "there is no package ;"),
        ("own.py:", "a function's name must follow the colon, got ''"),
        ("own.py:f()", r"a function's name must follow the colon, got 'f\(\)'"),
    ],
)
def test_a_spec_that_names_no_reward(spec, message):
    with pytest.raises(rewards.RewardError, match=message) as caught:
        rewards.parse(spec)
    assert "\n" not in str(caught.value)


def test_a_reward_is_given_once(own, monkeypatch, tmp_path):
    name = own("f = g = len")
    assert rewards.parse_all(["pickscore=2", name, name[:-1] + "g"]) == {
        "pickscore": 2,
        name: 1,
        name[:-1] + "g": 1,
    }
    monkeypatch.chdir(tmp_path)
    for twice in (["pickscore", "pickscore=2"], [name, "own/../own/mine.py:f"]):
        with pytest.raises(rewards.RewardError, match=" is there twice; give it once, in training"):
            rewards.parse_all(twice)


def test_a_path_may_have_an_equals_sign(own):
    name = own("f = len", folder="a=b")
    assert rewards.parse(name) == (name, 1) and rewards.parse(f"{name}=2") == (name, 2)


KINDS = {  # all that can be called is a reward
    "def": "def f(images, prompts):\n    return images.mean((1, 2, 3))",
    "lambda": "f = lambda images, prompts: images.mean((1, 2, 3))",
    "import": "from beside import mean as f",
    "star": "from beside import *",
    "partial": "import functools, beside\nf = functools.partial(beside.mean_over, (1, 2, 3))",
    "module": "import torch, beside\nclass Mean(torch.nn.Module):\n"
    "    def forward(self, images, prompts):\n        return beside.mean(images, prompts)\n"
    "f = Mean()",
    "decorator": "import functools\ndef loud(g):\n    @functools.wraps(g)\n"
    "    def inner(*given):\n        return g(*given)\n    return inner\n"
    "@loud\ndef f(images, prompts):\n    return images.mean((1, 2, 3))",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass Mean:\n    dims: tuple[int, ...] = (1, 2, 3)\n"
    "    def __call__(self, images, prompts):\n        return images.mean(self.dims)\n"
    "f = Mean()",
    "pickle": "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\n"
    "def f(images, prompts): return images.mean((1, 2, 3))",
    "lazy": "def f(images, prompts):\n    import later\n    return later.mean(images, prompts)",
    "byte-order mark": "\ufefff = lambda images, prompts: images.mean((1, 2, 3))",
}


@pytest.mark.parametrize("kind", KINDS)
def test_own_rewards_of_every_kind(kind, own, images, tmp_path):
    name = own(KINDS[kind])
    mean = "def mean(images, prompts):\n    return images.mean((1, 2, 3))\n"
    over = "def mean_over(dims, images, prompts):\n    return images.mean(dims)\nf = mean\n"
    (tmp_path / "own" / "beside.py").write_text(mean + over)
    (tmp_path / "own" / "later.py").write_text(mean)
    assert rewards.parse(name) == (name, 1)
    reward = rewards.load(name, "cpu")
    assert torch.allclose(rewards.score(name, reward, images, PROMPTS), images.mean((1, 2, 3)))


def test_a_file_is_run_once_and_hides_nothing(own, tmp_path):
    """Two rewards of a file share what it loads; files beside it do not stand for the project's."""
    name = own("import json, prompts\nloaded = []\nf = g = lambda images, prompts: loaded\n")
    (tmp_path / "own" / "prompts.py").write_text("")
    before = list(sys.path)
    f, g = (rewards.load(name[:-1] + letter, "cpu") for letter in "fg")
    assert f is g and sys.path == [*before, str(tmp_path / "own")]


LOADING = {  # as it is loaded: the file's source, and what is said of it
    "raise SystemExit(0)\nf = 1": "SystemExit: 0 .line 1.$",
    "import sys\nsys.exit()\nf = 1": "SystemExit .line 2.$",
    "import sys\nsys.exit('no key')\nf = 1": "SystemExit: no key .line 2.$",
    "f = 1 / 0": "ZeroDivisionError: division by zero .line 1.$",
    "import nothing_like_it\nf = 1": "ModuleNotFoundError: No module named 'nothing_like_it'",
    "class B(BaseException): pass\nraise B('so')\nf = 1": "B: so .line 2.$",
    "import os\nos._exit(0)\nf = 1": "SystemExit: 0 .line 2.$",
    "f = 1\nassert not f": "AssertionError .line 2.$",
    "f = 1\nraise ValueError('\\n  a\\nb\\n' * 1000)": "ValueError: a .line 2.$",
    "f = 1\nraise ValueError('x' * 10**6)": "ValueError: x{300} .line 2.$",
    "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\nf = 1": "E .line 3.$",
    "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E\nf = 1": "E .line 3.$",
    "f = 'f'": "f is a str, and must be callable with images and prompts$",
    "f2 = 'f'": "f is not there, and must be callable",
    "def f(images): pass": "cannot be called with images and prompts .too many positional",
    "def f(images, prompts, size): pass": "with images and prompts .missing a required .*'size'",
}


@pytest.mark.parametrize("source", LOADING, ids=range(len(LOADING)))
def test_a_file_that_fails_is_one_line(source, own):
    name = own(source)
    assert rewards.parse(name)
    for _ in range(2):  # nothing half loaded is kept
        with pytest.raises(rewards.RewardError, match=LOADING[source]) as caught:
            rewards.load(name, "cpu")
        assert str(caught.value).startswith(f"cannot load the reward {name}: ")
        assert "\n" not in str(caught.value)


def test_a_package_that_fails_is_one_line(own, monkeypatch, tmp_path):
    own("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    assert rewards.parse("mine:f")
    with pytest.raises(rewards.RewardError, match="cannot load the reward mine:f: SystemExit: 0$"):
        rewards.load("mine:f", "cpu")


def test_other_weights_are_of_a_reward_that_is_used_and_has_some():
    rewards.check_models({"pickscore": "a"}, {"pickscore": 1.0})
    with pytest.raises(rewards.RewardError, match="ocr is not among the rewards: pickscore$"):
        rewards.check_models({"ocr": "a"}, ["pickscore"])
    with pytest.raises(rewards.RewardError, match="brightness is of your own, and loads its wei"):
        rewards.check_models({f"{OWN}:brightness": "a"}, [f"{OWN}:brightness"])
    for name in ("ocr", "compressibility"):
        with pytest.raises(rewards.RewardError, match=f"the reward {name}: .*; leave out 'a'$"):
            rewards.load(name, "cpu", "a")


CHANGES = {
    "import os; os.chdir('/')": os.getcwd,
    "import sys; sys.stdout = None": lambda: sys.stdout,
    "import sys; sys.stderr = open('/dev/null', 'w')": lambda: sys.stderr,
    "torch.set_default_dtype(torch.float64)": torch.get_default_dtype,
    "torch.set_grad_enabled(False)": torch.is_grad_enabled,
    "torch.set_default_device('meta')": torch.get_default_device,
    "torch.set_num_threads(7)": torch.get_num_threads,
    "torch.use_deterministic_algorithms(True)": torch.are_deterministic_algorithms_enabled,
    "torch.autograd.set_detect_anomaly(True)": torch.is_anomaly_enabled,
    "import warnings; warnings.simplefilter('error')": lambda: warnings.filters[:],
    "import signal; signal.signal(15, signal.SIG_IGN)": lambda: signal.getsignal(15),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("end", ["return [1.0] * len(images)", "raise ValueError"])
def test_what_foreign_code_sets_ends_with_it(change, end, own, images):
    asked, before = CHANGES[change], CHANGES[change]()
    try:
        file = f"import torch\n{change}\ndef f(images, prompts):\n    {change}\n    {end}"
        name = own(file)
        reward = rewards.load(name, "cpu")
        assert asked() == before  # of what its import sets
        try:
            assert rewards.score(name, reward, images, PROMPTS).tolist() == [1, 1, 1]
        except rewards.RewardError:
            pass
        assert asked() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.set_default_device(None)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)
        torch.set_anomaly_enabled(False)


REPLACED = {  # what code of others replaces for the whole process, and what asks whether it is back
    "sys.path.clear()": lambda: sys.path[:1],
    "sys.path = None": lambda: sys.path[:1],
    "os.environ.clear()": lambda: dict(os.environ),
    "os.environ['PATH'] = ''": lambda: os.environ["PATH"],
    "builtins.open = builtins.len = None": lambda: (open, len),
    "json.dumps = None": lambda: json.dumps,
    "torch.stack = torch.as_tensor = None": lambda: (torch.stack, torch.as_tensor),
}


@pytest.mark.parametrize("how", REPLACED)
def test_what_a_reward_replaces_is_back_and_what_it_adds_stays(how, own, images):
    asked, before = REPLACED[how], REPLACED[how]()
    added = "os.environ['OF_MINE'] = '1'; sys.path.insert(0, '/of/mine')"
    body = f"    {added}\n    {how}\n    return images.mean((1, 2, 3))"
    name = own(f"import builtins, json, os, sys, torch\n\ndef f(images, prompts):\n{body}")
    kept, environment = list(sys.path), dict(os.environ)
    functions = [(module, dict(vars(module))) for module in (builtins, json, torch)]
    try:
        rewards.score(name, rewards.load(name, "cpu"), images, PROMPTS)
        assert asked() == before
        if "sys.path" not in how:
            assert sys.path[-1] == "/of/mine"
        if "clear" not in how:
            assert os.environ["OF_MINE"] == "1"
    finally:
        sys.path = kept
        os.environ.clear()
        os.environ.update(environment)
        for module, names in functions:
            vars(module).update(names)


LATER = "import threading; threading.Timer(0.1, lambda: os._exit(1)).start()"  # after the call
LEAVING = {  # what ends the process at once: how, and what becomes of it
    "os._exit(0)": "SystemExit: 0 .line 4.$",
    LATER: None,
    "os.fork() or os._exit(0); os.wait(); f()": "TypeError: .*missing 2 .*line 4.$",
    "os.fork()": None,
}


@pytest.mark.parametrize("how", LEAVING)
def test_no_reward_ends_the_process_and_no_child_of_it_goes_on(how, own, images, tmp_path):
    """Another process can be ended by os._exit, as those of multiprocessing do."""
    name = own(f"import os\n\ndef f(images, prompts):\n    {how}\n    return [1] * len(images)")
    reward = rewards.load(name, "cpu")
    try:
        scores = rewards.score(name, reward, images, PROMPTS)
        assert scores.tolist() == [1, 1, 1] and LEAVING[how] is None
    except rewards.RewardError as error:
        assert re.search(LEAVING[how], str(error))
    time.sleep(0.3 * (how == LATER))
    with open(tmp_path / "after", "a") as after:
        after.write("a process goes on\n")
    with suppress(ChildProcessError):
        os.wait()
    assert (tmp_path / "after").read_text() == "a process goes on\n"


@pytest.mark.filterwarnings("error")
def test_a_reward_that_is_async_is_one_line(own, images):
    name = own("async def f(images, prompts):\n    return [1.0] * len(images)")
    with pytest.raises(rewards.RewardError, match="got a coroutine that holds no numbers"):
        rewards.score(name, rewards.load(name, "cpu"), images, PROMPTS)
    gc.collect()


def test_a_stream_that_a_reward_closes_is_one_that_nobody_reads(images, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    rewards.score("mine", lambda *_: sys.stdout.close() or [1] * 3, images, PROMPTS)
    assert not sys.stdout.closed
    print("this is no error")


PER_IMAGE = """
import functools
def per_image(score):
    @functools.wraps(score)
    def all_of_them(images, prompts): return [score(image) for image in images]
    return all_of_them
@per_image
def f(image): return image.mean()
"""
SPAWNS = """
import multiprocessing
def mean(values): return sum(values) / len(values)
def f(images, prompts):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(mean, images.flatten(1).tolist())
"""
BESIDE = "import prompts\ndef f(images, _): return images.mean((1, 2, 3)) * prompts.ONE"


@pytest.mark.parametrize("source", [PER_IMAGE, SPAWNS, BESIDE], ids=["wraps", "spawn", "beside"])
def test_what_people_write(source, own, images, tmp_path):
    """A decorator for one image, a pool, and a module that has the name of one of this project."""
    name, project = own(source), importlib.import_module("prompts")
    (tmp_path / "own" / "prompts.py").write_text("ONE = 1")
    found = rewards.score(name, rewards.load(name, "cpu"), images, PROMPTS)
    assert torch.allclose(found, images.mean((1, 2, 3)), atol=1e-5)
    assert sys.modules["prompts"] is project


def test_two_rewards_have_helpers_of_one_name(own, images, tmp_path):
    for folder, k in (("a", 1), ("b", 100)):
        (tmp_path / folder / "beside").mkdir(parents=True)
        (tmp_path / folder / "beside" / "__init__.py").write_text(f"K = {k}")
        name = own(
            "from beside import K\ndef f(images, _): return [K] * len(images)", folder=folder
        )
        found = rewards.score(name, rewards.load(name, "cpu"), images, PROMPTS)
        assert found.tolist() == [k] * 3


def test_a_reward_has_images_and_prompts_of_its_own(images):
    name, prompts = f"{OWN}:darkening", copy.deepcopy(PROMPTS)
    kept, expected = images.clone(), images.mean((1, 2, 3))
    reward = rewards.load(name, "cpu")
    for _ in range(2):
        assert torch.allclose(rewards.score(name, reward, images, prompts), expected)
    assert torch.equal(images, kept) and prompts == PROMPTS


def test_scores_are_of_their_own_and_without_gradients(images):
    buffer, weight = torch.zeros(3), torch.ones(3, requires_grad=True)
    first = rewards.score("mine", lambda images, prompts: buffer, images, PROMPTS)
    buffer += 1
    assert first.tolist() == [0, 0, 0] and first.dtype == torch.float32
    sparse = torch.tensor([0.0, 1.0, 0.0]).to_sparse()
    assert rewards.score("mine", lambda *_: sparse, images, PROMPTS).tolist() == [0, 1, 0]
    mixed = [Decimal("0.5"), Fraction(1, 4), 2]
    assert rewards.score("mine", lambda *_: mixed, images, PROMPTS).tolist() == [0.5, 0.25, 2]
    numbers = np.arange(3)
    for array in (
        np.array([2, 1, 0.0])[::-1],
        *map(numbers.astype, (">f4", np.longdouble, "u2", "f2")),
    ):
        found = rewards.score("mine", lambda *_, given=array: given, images, PROMPTS)
        assert found.tolist() == [0, 1, 2]
    masked = np.ma.array([0.0, 1, 2], mask=[True, False, False])
    found = rewards.score("mine", lambda *_: masked, images, PROMPTS)
    assert found.isnan().tolist() == [True, False, False]
    seen = []
    rewards.score(
        "mine", lambda images, prompts: seen.append(weight * 2) or weight, images, PROMPTS
    )
    assert not seen[0].requires_grad


def leave(*code):
    raise SystemExit(*code)


def fail(*message):
    raise ValueError(*message)


FAILING = [
    (
        lambda images, prompts: 1 / 0,
        r"failed on images of prompt 'a red circle': ZeroDivisionError",
    ),
    (lambda images, prompts: leave(0), "'a red circle': SystemExit: 0$"),
    (lambda images, prompts: leave(), "SystemExit$"),
    (lambda images, prompts: fail(), "ValueError$"),
    (lambda images, prompts: fail("a\nb\n" * 1000), "ValueError: a$"),
    (
        lambda images, prompts: prompts[0].lower(),
        r"'dict' object has no attribute 'lower'; a prompt is a dict, and prompt\['prompt'\] its",
    ),
    (lambda images, prompts: prompts[0] + ", please", "TypeError: .*; a prompt is a dict, and"),
    (lambda images, prompts: fail("predict"), "ValueError: predict$"),
    (
        lambda images, prompts: [1.0],
        r"must return 3 scores, got \(1,\), of prompt 'a red",
    ),
    (lambda images, prompts: [[1.0]] * 3, r"must return 3 scores, got \(3, 1\)"),
    (lambda images, prompts: torch.ones(3) * 1j, r"must return 3 scores, got complex \(3,\)"),
    (lambda images, prompts: [1j] * 3, r"must return 3 scores, got complex \(3,\)"),
    (
        lambda images, prompts: ["good"] * 3,
        "must return 3 scores, got a list that holds no numbers",
    ),
    (lambda images, prompts: [1e308, 1, 2], r"got 1e\+308, and at most 1e\+09"),
    (lambda images, prompts: -images.mean((1, 2, 3)) - 1e20, r"got -1e\+20, and at most 1e\+09"),
    (lambda images, prompts: [10**400, 1, 2], "got a list that holds no numbers .*verflow"),
    (lambda images, prompts: "abc", "got a str that holds no numbers"),
    (lambda images, prompts: None, "got a NoneType that holds no numbers"),
    (lambda images, prompts: (1.0 for _ in images), "got a generator that holds no numbers"),
    (lambda images, prompts: [10**400] * 3, "got a list that holds no numbers"),
]


@pytest.mark.parametrize(("reward", "message"), FAILING, ids=range(len(FAILING)))
def test_a_reward_that_fails_is_named(reward, message, images):
    with pytest.raises(rewards.RewardError, match=message) as caught:
        rewards.score("mine", reward, images, PROMPTS)
    assert str(caught.value).startswith("reward mine ") and "\n" not in str(caught.value)


def test_the_line_of_the_file_is_named(images):
    name = f"{OWN}:leaving"
    (line,) = (i for i, text in enumerate(open(OWN), 1) if "raise SystemExit(0)" in text)
    with pytest.raises(rewards.RewardError, match=rf"own_rewards.py:leaving .* \(line {line}\)$"):
        rewards.score(name, rewards.load(name, "cpu"), images, PROMPTS)


def test_ctrl_c_passes_and_a_rewards_own_does_not(images):
    """Under Python's handler it may be the user's; under one that remembers it never is."""
    name, place = f"{OWN}:interrupting", signal.SIGINT
    reward = rewards.load(name, "cpu")
    remembered = []
    before = signal.signal(place, signal.default_int_handler)  # the trainer's tests have others
    try:
        with pytest.raises(KeyboardInterrupt):
            rewards.score(name, reward, images, PROMPTS)
        with pytest.raises(KeyboardInterrupt):  # a real one
            rewards.score("mine", lambda *_: os.kill(os.getpid(), place), images, PROMPTS)
        cli.heed([place], cli.interrupt)  # the scripts' own tells them apart
        with pytest.raises(KeyboardInterrupt):
            rewards.score("mine", lambda *_: os.kill(os.getpid(), place), images, PROMPTS)
        with pytest.raises(rewards.RewardError, match="'a red circle': KeyboardInterrupt"):
            rewards.score(name, reward, images, PROMPTS)
        signal.signal(place, lambda *_: remembered.append(1))
        with pytest.raises(rewards.RewardError, match="'a red circle': KeyboardInterrupt"):
            rewards.score(name, reward, images, PROMPTS)
        asked = rewards.score(
            "mine", lambda *_: os.kill(os.getpid(), place) or [1] * 3, images, PROMPTS
        )
        assert asked.tolist() == [1, 1, 1] and remembered == [1]
    finally:
        signal.signal(place, before)
    with ThreadPoolExecutor(1) as pool:  # where no Ctrl-C arrives
        with pytest.raises(rewards.RewardError, match="KeyboardInterrupt"):
            pool.submit(rewards.score, name, reward, images, PROMPTS).result()


def test_the_example_in_the_docstring_works(own, images):
    example = textwrap.dedent(re.search(r"\n( +def .*?\n)\n", rewards.__doc__, re.DOTALL)[1])
    assert len(example.splitlines()) == 3
    function = re.match(r"def (\w+)", example)[1]
    name = own(example, function)
    assert rewards.parse(name) == (name, 1)
    scores = rewards.score(name, rewards.load(name, "cpu"), images, PROMPTS)
    blueness = (images[:, 2] - images[:, 0]).mean((1, 2))
    assert torch.allclose(scores, blueness * torch.tensor([-1.0, 1, -1]))


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers to every request that there is no such thing."""
    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    asked = []
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield asked
    listening.shutdown()
    listening.server_close()


def test_the_hub_is_asked_for_what_is_not_here(hub, monkeypatch):
    """Weights that are here are loaded unasked; others after one request that is answered."""
    from huggingface_hub import constants

    from rewards import compressibility

    def load(device, model=None):
        tried.append(constants.HF_HUB_OFFLINE)
        if not model and constants.HF_HUB_OFFLINE:
            raise FileNotFoundError("not here\nat all")
        return len

    tried = []
    monkeypatch.setattr(compressibility, "load", load)
    assert rewards.load("compressibility", "cpu", "folder") is len and not hub and tried == [True]
    assert rewards.load("compressibility", "cpu") is len
    assert hub == ["/"] and tried == [True, True, False] and not constants.HF_HUB_OFFLINE

    with pytest.raises(rewards.RewardError, match="not all that it needs is on this machine$"):
        rewards.load("compressibility", "cpu", fetch=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = "not all that it needs .*; unset HF_HUB_OFFLINE, or .* --reward_model compressibility="
    with pytest.raises(rewards.RewardError, match=line):
        rewards.load("compressibility", "cpu")
    with pytest.raises(rewards.RewardError, match="'a' is no folder here with all that it needs"):
        monkeypatch.setattr(compressibility, "load", lambda *_: open("nowhere"))
        rewards.load("compressibility", "cpu", "a")
    assert hub == ["/"] and constants.HF_HUB_OFFLINE


def test_without_a_network_it_is_one_line_at_once(tmp_path):
    """Sixty lines and two minutes each, when the hub's client is left to itself."""
    named = ["pickscore", "aesthetic", "imagereward"]
    code = f"""if True:
        import time
        import transformers, rewards
        for name in {named}:
            start = time.monotonic()
            try:
                rewards.load(name, "cpu")
            except rewards.RewardError as error:
                print(time.monotonic() - start, error)"""
    places = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **places, **nobody, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    for name, line in zip(named, ran.stdout.splitlines(), strict=True):
        seconds, line = line.split(" ", 1)
        assert (
            line.startswith(f"cannot load the reward {name}: ") and float(seconds) < 60
        )  # not minutes
        assert "http://127.0.0.1:9 does not answer" in line
        assert f"--reward_model {name}=" in line and "HF_HUB_OFFLINE=1" in line
    assert "Retrying" not in ran.stderr


def test_compressibility_is_minus_the_size_as_jpeg(images):
    images[1] = 0.5
    scores = rewards.load("compressibility", "cpu")(images, PROMPTS)
    file = io.BytesIO()
    pixels = (images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    assert scores[0] == -len(file.getvalue()) / 1000
    assert scores[1] > scores[0] and scores[1] > scores[2]


def test_pickscore_is_the_scaled_cosine(tiny_clip, images):
    reward = rewards.load("pickscore", "cpu", str(tiny_clip))
    clip = CLIPModel.from_pretrained(tiny_clip).eval()
    processor = CLIPProcessor.from_pretrained(tiny_clip)
    by_hand = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        seen = processor.image_processor(pixels, return_tensors="pt")["pixel_values"]
        read = processor.tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            u = clip.visual_projection(clip.vision_model(seen).pooler_output)[0]
            v = clip.text_projection(clip.text_model(read).pooler_output)[0]
        cosine = u @ v / u.norm() / v.norm()
        by_hand.append(clip.logit_scale.exp().item() * cosine.item())
    assert reward(images, PROMPTS).tolist() == pytest.approx(by_hand, rel=1e-4)
    assert len({round(score, 4) for score in by_hand}) == 3


def test_aesthetic_is_the_linear_head_on_the_normalised_embedding(tiny_clip, images, tmp_path):
    clip = CLIPModel.from_pretrained(tiny_clip).eval()
    sizes, state = [clip.config.projection_dim, 1024, 128, 64, 16, 1], {}
    torch.manual_seed(0)
    for i, place in enumerate((0, 2, 4, 6, 7)):  # as the published file has them
        state[f"layers.{place}.weight"] = torch.randn(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5
        state[f"layers.{place}.bias"] = torch.randn(sizes[i + 1])
    torch.save(state, tmp_path / "head.pth")
    reward = rewards.load("aesthetic", "cpu", f"{tiny_clip},{tmp_path / 'head.pth'}")

    processor = CLIPProcessor.from_pretrained(tiny_clip)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seen = processor.image_processor(list(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        x = clip.visual_projection(clip.vision_model(seen).pooler_output)
        x = x / x.norm(dim=1, keepdim=True)
        for place in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    assert torch.allclose(reward(images, PROMPTS), x[:, 0], rtol=1e-4, atol=1e-5)


def published_imagereward(width=128, hidden=64, patch=8, side=24):
    """Random tensors under the names of the published ImageReward.pt."""
    generator, state = torch.Generator().manual_seed(0), {}

    def put(name, *shape):
        state[name] = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def linear(name, n_out, n_in):
        put(f"{name}.weight", n_out, n_in)
        put(f"{name}.bias", n_out)

    def norm(name, n):
        scale, shift = torch.rand(2, n, generator=generator)
        state[f"{name}.weight"], state[f"{name}.bias"] = scale + 0.5, shift

    seeing, reader = "blip.visual_encoder.", "blip.text_encoder."
    put(f"{seeing}cls_token", 1, 1, width)
    put(f"{seeing}pos_embed", 1, (side // patch) ** 2 + 1, width)
    put(f"{seeing}patch_embed.proj.weight", width, 3, patch, patch)
    put(f"{seeing}patch_embed.proj.bias", width)
    for i in range(2):
        block = f"{seeing}blocks.{i}."
        norm(f"{block}norm1", width), norm(f"{block}norm2", width)
        linear(f"{block}attn.qkv", 3 * width, width), linear(f"{block}attn.proj", width, width)
        linear(f"{block}mlp.fc1", 2 * width, width), linear(f"{block}mlp.fc2", width, 2 * width)
    norm(f"{seeing}norm", width)
    put(f"{reader}embeddings.word_embeddings.weight", 40, hidden)
    put(f"{reader}embeddings.position_embeddings.weight", 48, hidden)
    state[f"{reader}embeddings.position_ids"] = torch.arange(48)[None]
    norm(f"{reader}embeddings.LayerNorm", hidden)
    for i in range(2):
        layer = f"{reader}encoder.layer.{i}."
        for kind, n in (("attention", hidden), ("crossattention", width)):
            linear(f"{layer}{kind}.self.query", hidden, hidden)
            linear(f"{layer}{kind}.self.key", hidden, n)
            linear(f"{layer}{kind}.self.value", hidden, n)
            linear(f"{layer}{kind}.output.dense", hidden, hidden)
            norm(f"{layer}{kind}.output.LayerNorm", hidden)
        linear(f"{layer}intermediate.dense", 2 * hidden, hidden)
        linear(f"{layer}output.dense", hidden, 2 * hidden)
        norm(f"{layer}output.LayerNorm", hidden)
    sizes = [hidden, 1024, 128, 64, 16, 1]
    for i, place in enumerate((0, 2, 4, 6, 7)):
        linear(f"mlp.layers.{place}", sizes[i + 1], sizes[i])
    return state


def imagereward_by_hand(state, pixels, ids, mask):
    """The published forward pass of one picture (3, H, W) and one prompt's tokens, written out."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, mask=None):  # (tokens, width), heads 64 wide
        q, k, v = (x.view(len(x), -1, 64).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / 8
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    seeing, reader = "blip.visual_encoder.", "blip.text_encoder."
    kernel = state[f"{seeing}patch_embed.proj.weight"]
    x = F.conv2d(pixels, kernel, state[f"{seeing}patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([state[f"{seeing}cls_token"][0], x.flatten(1).T]) + state[f"{seeing}pos_embed"][0]
    for i in range(2):
        block = f"{seeing}blocks.{i}."
        qkv = linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}attn.proj", attend(*qkv))
        up = F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6)))
        x = x + linear(f"{block}mlp.fc2", up)
    seen = norm(f"{seeing}norm", x, 1e-6)

    h = state[f"{reader}embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{reader}embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(f"{reader}embeddings.LayerNorm", h, 1e-12)
    for i in range(2):
        layer = f"{reader}encoder.layer.{i}."
        for kind, source, hide in (("attention", None, mask), ("crossattention", seen, None)):
            k_from = h if source is None else source
            q = linear(f"{layer}{kind}.self.query", h)
            k, v = (linear(f"{layer}{kind}.self.{part}", k_from) for part in ("key", "value"))
            out = linear(f"{layer}{kind}.output.dense", attend(q, k, v, hide))
            h = norm(f"{layer}{kind}.output.LayerNorm", out + h, 1e-12)
        up = F.gelu(linear(f"{layer}intermediate.dense", h))
        h = norm(f"{layer}output.LayerNorm", linear(f"{layer}output.dense", up) + h, 1e-12)
    score = h[0]
    for place in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{place}", score)
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def imagereward_files(tmp_path):
    """The published file in small, and a word tokenizer of BERT's kind."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red green circle square and blue".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "words")
    torch.save(published_imagereward(), tmp_path / "ImageReward.pt")
    return tmp_path / "words", tmp_path / "ImageReward.pt"


def test_imagereward_is_the_published_forward_pass(imagereward_files):
    words, file = imagereward_files
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    reward = rewards.load("imagereward", "cpu", f"{words},{file}")
    tokenizer, state = BertTokenizer.from_pretrained(words), torch.load(file, weights_only=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    by_hand = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        tokens = tokenizer(prompt["prompt"], padding="max_length", max_length=35)
        ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
        pixels = ((image * 255).round() / 255 - mean) / std
        by_hand.append(imagereward_by_hand(state, pixels, ids, mask.bool()))
    assert reward(images, PROMPTS).tolist() == pytest.approx(by_hand, abs=1e-4)
    assert len({round(score, 3) for score in by_hand}) == 3


def test_imagereward_of_another_file_is_refused(imagereward_files, tmp_path):
    words, file = imagereward_files
    state = torch.load(file, weights_only=True)
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(rewards.RewardError, match="crossattention.self.key.bias"):
        rewards.load("imagereward", "cpu", f"{words},{tmp_path / 'other.pt'}")


def test_a_head_is_not_fetched_while_the_hub_is_off(monkeypatch, tmp_path):
    """torch's own cache heeds no HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    from rewards import aesthetic

    url, fetched = "https://nowhere.invalid/a%2Bb.pth", []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: fetched.append(a))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="a%2Bb.pth is not in"):
        aesthetic.read_head(url)
    assert not fetched
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a%2Bb.pth").touch()
    aesthetic.read_head(url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    aesthetic.read_head("https://nowhere.invalid/other.pth")
    assert fetched == [(url,), ("https://nowhere.invalid/other.pth",)]


def test_other_weights_of_aesthetic_are_two_things():
    with pytest.raises(rewards.RewardError, match="weights are given as clip,head.pth, got 'clip'"):
        rewards.load("aesthetic", "cpu", "clip")
