"""No line of the packages can run what a file, a peer or a user's word says: read from the syntax trees themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "data_prep", "slurm")

MODULES = {
    *(
        "pickle",
        "_pickle",
        "cPickle",
        "pickletools",
        "shelve",
        "marshal",
        "dill",
        "cloudpickle",
        "joblib",
        "jsonpickle",
    ),
    *("code", "codeop", "runpy", "torch.distributed.checkpoint", "torch.package", "torch.hub"),
}
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
# Wherever they hang: methods and functions that pickle, unpickle, or hand text to a shell.
NAMES = {
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "bcast", "allgather", "alltoall", "sendrecv"),  # mpi4py's that pickle
    *("popen", "getoutput", "getstatusoutput", "create_subprocess_shell"),
    *("DelayedSubmission", "pickle_dump", "cloudpickle_dump", "map_array"),  # submitit's
}
ATTRIBUTES = {
    *(("os", "system"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("dcp", "load")),
    *(("jit", "load"), ("np", "fromregex"), ("importlib", "reload")),
}
SUBMITIT = {"SlurmExecutor", "SlurmJob"}  # its objects that we use; all else of it goes through pickles
TRUE_ONLY, FALSE_ONLY = {"weights_only"}, {"shell", "allow_pickle", "trust_remote_code"}


def faults_in(source: str) -> Iterator[str]:
    """``line: what`` for everything that is not allowed."""
    tree = ast.parse(source)
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}  # a parameter may be called eval
    for node in ast.walk(tree):
        yield from (f"{getattr(node, 'lineno', 0)}: {fault}" for fault in faults_of(node, own))


def faults_of(node: ast.AST, own: set[str]) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (f"import {name.name}" for name in names if unsafe_module(name.name))
        case ast.ImportFrom(module=str(module), names=names):
            for name in names:
                if unsafe_module(module) or unsafe_module(f"{module}.{name.name}"):
                    yield f"from {module} import {name.name}"
                if name.name in NAMES or (module, name.name) in ATTRIBUTES:
                    yield f"import of {name.name}"
                if module.split(".")[0] == "submitit":
                    yield f"from {module} import {name.name}"
        case ast.Name(id=name, ctx=ast.Load()) if name in (BUILTINS - own) | NAMES:
            yield name
        case ast.Attribute(value=ast.Name(id="submitit"), attr=name) if name not in SUBMITIT:
            yield f"submitit.{name}"
        case ast.Attribute(value=owner, attr=name):
            if name in NAMES or (last_name(owner), name) in ATTRIBUTES:
                yield name
            if name == "submit" and last_name(owner) != "queue":
                yield "submitit's submit"
            if name in BUILTINS and last_name(owner) == "builtins":
                yield name
        case ast.Constant(value=str(text)) if text in MODULES - {"code"}:
            yield f"the module name {text!r}"
        case ast.Call():
            yield from faults_of_call(node)


def faults_of_call(call: ast.Call) -> Iterator[str]:
    if isinstance(call.func, ast.Name) and call.func.id in BUILTINS:
        yield call.func.id
    said = {keyword.arg: keyword.value for keyword in call.keywords}
    for name, value in said.items():
        if name in FALSE_ONLY and not is_constant(value, False):
            yield f"{name}="
        if name in TRUE_ONLY and not is_constant(value, True):
            yield f"{name}="
    if isinstance(call.func, ast.Attribute) and call.func.attr == "load" and last_name(call.func.value) == "torch":
        if "weights_only" not in said:
            yield "torch.load without weights_only=True"
        if None in said:
            yield "torch.load with **"


def is_constant(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def unsafe_module(name: str) -> bool:
    return name in MODULES or any(name.startswith(f"{module}.") for module in MODULES)


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_the_packages_hold_nothing_unsafe() -> None:
    found = [f"{path.relative_to(ROOT)}:{fault}" for path in files() for fault in faults_in(path.read_text())]
    assert not found, "\n".join(found)
    assert len(files()) > 60


UNSAFE = (
    "import pickle",
    "import pickle as p, os",
    "from pickle import loads",
    "import shelve",
    "import marshal",
    "import dill",
    "from cloudpickle import dumps",
    "def f():\n    import _pickle",
    "importlib.import_module('pickle')",
    "import torch.distributed.checkpoint as dcp",
    "from torch.distributed import checkpoint",
    "from torch.distributed.checkpoint import load",
    "dcp.load(state)",
    "eval(text)",
    "exec(text)",
    "compile(text, '', 'exec')",
    "run = eval",
    "builtins.exec(text)",
    "def f(eval):\n    return eval(text)",
    "__import__(name)",
    "os.system('ls')",
    "from os import system",
    "os.popen('ls')",
    "subprocess.getoutput('ls')",
    "subprocess.run('ls', shell=True)",
    "subprocess.Popen(words, shell=flag)",
    "yaml.load(text)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=safe)",
    "torch.load(path, **options)",
    "torch.jit.load(path)",
    "np.load(path, allow_pickle=True)",
    "numpy.load(path, allow_pickle=flag)",
    "dist.broadcast_object_list(items)",
    "dist.all_gather_object(items, item)",
    "from torch.distributed import scatter_object_list",
    "world.bcast(item)",
    "executor.submit(function)",
    "super().submit(function)",
    "submitit.AutoExecutor(folder)",
    "from submitit.core.utils import DelayedSubmission",
    "import submitit.core.utils as u\nu.pickle_dump(x, y)",
    "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
)
SAFE = (
    "re.compile('a')",
    "torch.load(path, map_location='cpu', weights_only=True)",
    "np.load(path)",
    "np.load(path, allow_pickle=False)",
    "subprocess.run(['ls'], shell=False)",
    "dist.broadcast(tensor, 0)",
    "world.Allgather(a, b)",
    "queue.submit(path, words)",
    "submitit.SlurmExecutor.__init__",
    "json.loads(text)",
    "class C:\n    eval: str",
    "def f(*, eval: Path):\n    return read(eval)",
    "model.eval()",
    "loader.exec_module(module)",
    "no_pickle = 'not a pickle, no eval()'",
)


@pytest.mark.parametrize("source", UNSAFE)
def test_every_unsafe_way_is_seen(source: str) -> None:
    assert list(faults_in(source))


@pytest.mark.parametrize("source", SAFE)
def test_safe_code_is_let_through(source: str) -> None:
    assert not list(faults_in(source))
