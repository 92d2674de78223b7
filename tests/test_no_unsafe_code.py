"""No line of the packages can run what a file, a peer or a user's word says: read from the syntax trees themselves.

Names are resolved first, through imports, their aliases and plain assignments: ``from torch import load as read`` and
``t = torch`` hide nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "data_prep", "slurm")
Names = Mapping[str, str]  # what a name in a file stands for: np → numpy

MODULES = {
    *("pickle", "_pickle", "cPickle", "pickletools", "shelve", "marshal", "dill", "cloudpickle", "joblib"),
    *("jsonpickle", "code", "codeop", "runpy", "torch.distributed.checkpoint", "torch.package", "torch.hub"),
    *("multiprocessing.managers", "multiprocessing.shared_memory", "xmlrpc", "asyncore", "cffi"),
    *(
        "timeit",
        "pdb",
        "bdb",
        "profile",
        "cProfile",
        "trace",
        "pty",
        "imp",
        "zipimport",
        "importlib.machinery",
        "copyreg",
    ),
    *("logging.config", "site", "pandas", "torch.serialization", "torch.utils.cpp_extension", "torch.export"),
}
WORDS = {"code", "profile", "site", "trace"}  # of MODULES, and of the language
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint", "__builtins__", "globals"}
ANYWHERE = {  # methods and functions by their last name, whatever they hang on
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"),
    *("recv_object_list", "bcast", "allgather", "alltoall", "sendrecv"),  # these pickle, mpi4py's lower case too
    *("getoutput", "getstatusoutput", "create_subprocess_shell", "popen"),
    *("DelayedSubmission", "pickle_dump", "cloudpickle_dump", "map_array"),  # submitit's
    *("load_library", "LoadLibrary", "load_inline", "unpack_archive", "extractall"),
    *("ExternalLink", "SoftLink", "VirtualLayout", "create_virtual_dataset"),  # h5py's ways out of a file
    *("__dict__", "__builtins__", "__globals__", "__subclasses__", "FunctionType", "cdll"),
    *("read_pickle", "load_module", "h5f", "addsitedir"),
    *("Pipe", "Pool", "Manager", "Listener", "Client", "JoinableQueue", "ProcessPoolExecutor"),  # they pickle
}
RESOLVED = (
    r"(.*\.)?_?os\.(system|startfile|exec[lv]\w*|spawn[lv]\w*|posix_spawnp?)",
    r"(yaml|ruamel\.yaml)\.(?!safe_|CSafe|Safe)\w*[lL]oad\w*",
    r"(.*\.)?(dcp\.load|jit\.load|np\.fromregex|numpy\.fromregex|importlib\.reload|builtins\.(eval|exec|compile))",
    r"mpi4py\.(.*\.)?i?(send|recv|ssend|bsend|rsend|gather|scatter|reduce|allreduce|scan|exscan|isend|irecv)",
    r"(multiprocessing|torch\.multiprocessing)\.(Queue|SimpleQueue)",
    r"(.*\.)?(serialization|npyio|_legacy_load|cpp_extension|torch\.hub|torch\.export)\.\w+",
    r"numpy\.(loads|lib\.format\.\w+)",
    r"sys\.(modules\.\w+|path)|asyncio\.(create_)?subprocess\w*",
    r"submitit\.(?!SlurmExecutor\b|SlurmJob\b).*",  # all else of it goes through pickles
)
IN_FULL = {"torch.load": 2, "numpy.load": 1, "np.load": 1}  # called by this name, with at most so many plain arguments
WITH_CONSTANT = {  # the first argument of each is written there, not computed
    *("importlib.import_module", "import_module", "ctypes.CDLL", "ctypes.PyDLL", "CDLL", "PyDLL"),
    *("importlib.util.spec_from_file_location",),
}
KEYWORDS: Mapping[str, bool | None] = {  # what each must be; None: not given at all
    **{"weights_only": True, "shell": False, "allow_pickle": False, "trust_remote_code": False},
    **{"pickle_module": None, "preexec_fn": None},
    "executable": None,
}
SHELLS = re.compile(r"(.*/)?(ba|da|z|k|c|tc)?sh")

ALLOWED = {  # file: (fault, why it is none)
    "data_prep/fanout.py": ("Pipe", "between a process and its own child, no name that others could open"),
    "pipeline/bench/gpu.py": ("Pipe", "between a process and its own child, no name that others could open"),
    "pipeline/bench/turns.py": ("Pipe", "between a process and its own child, no name that others could open"),
    "data_prep/sentences.py": ("a computed import_module", "one of two constants of the same file"),
    "pipeline/stage.py": ("a computed import_module", "a function of the table in pipeline/stages.py"),
    "pipeline/node/command.py": ("preexec_fn=", "a function of the same file that calls prctl and signal alone"),
    "pipeline/__main__.py": ("import runpy", "one of the commands in the table of the same file"),
    "slurm/devcluster/network.py": ("a shell's -c", "constants; what varies comes behind them as arguments"),
}


def names_in(tree: ast.AST) -> dict[str, str]:
    """What imports and plain assignments call things, in full."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=given):
                names |= {item.asname or item.name.split(".")[0]: item.name if item.asname else item.name.split(".")[0]
                          for item in given}  # fmt: skip
            case ast.ImportFrom(module=str(module), names=given, level=0):
                names |= {item.asname or item.name: f"{module}.{item.name}" for item in given}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = [*zip(target.elts, node.value.elts, strict=False)]
                for name, value in pairs:
                    if isinstance(name, ast.Name) and (full := in_full(value, names)).partition(".")[0] in IMPORTED:
                        names.setdefault(name.id, full)
    return names


IMPORTED = {
    "torch",
    "numpy",
    "os",
    "yaml",
    "mpi4py",
    "multiprocessing",
    "importlib",
    "ctypes",
    "h5py",
    "builtins",
    "sys",
}


def in_full(node: ast.AST, names: Names) -> str:
    """``np.load`` as ``numpy.load``; what hangs on anything but a name begins with a point."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return f"{in_full(node.value, names)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def faults_in(source: str) -> Iterator[str]:
    """``line: what`` for everything that is not allowed."""
    tree = ast.parse(source)
    names, own = names_in(tree), {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    yield from handed_on(tree, names)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in inside and in_full(node.func, names) == "h5py.File":
            yield from [f"{node.lineno}: h5py.File outside a function"] * opens_to_read(node)
    for node in ast.walk(tree):
        for fault in faults_of(node, names, own, called):
            yield f"{getattr(node, 'lineno', 0)}: {fault}"


def handed_on(tree: ast.AST, names: Names) -> Iterator[str]:
    """Modules that are more than the left side of a point: kept or given under a name that no rule here resolves."""
    looked_into = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports = [item for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names]
    modules = {item.asname or item.name.partition(".")[0] for item in imports}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if name in modules and id(node) not in looked_into:
                if names[name].partition(".")[0] in IMPORTED:
                    yield f"{node.lineno}: the module {name} handed on"


def faults_of(node: ast.AST, names: Names, own: set[str], called: set[int]) -> Iterator[str]:
    match node:
        case ast.Import(names=given):
            yield from (f"import {item.name}" for item in given if unsafe_module(item.name))
        case ast.ImportFrom(module=str(module), names=given):
            for item in given:
                full = f"{module}.{item.name}"
                if unsafe_module(module) or unsafe_module(full) or unsafe(full) or full in IN_FULL or item.name == "*":
                    yield f"from {module} import {item.name}"
        case ast.Name(id=name, ctx=ast.Load()) if name in BUILTINS - own or unsafe(names.get(name, name)):
            yield name  # a parameter may be called eval
        case ast.Attribute(attr=name):
            full = in_full(node, names)
            if unsafe(full):
                yield name
            if full in IN_FULL and id(node) not in called:
                yield f"{full} not called at once"
            if name == "submit" and not full.endswith("queue.submit"):
                yield "submitit's submit"
        case ast.Constant(value=str(text)) if text in MODULES - WORDS:
            yield f"the module name {text!r}"
        case ast.List(elts=words) | ast.Tuple(elts=words):
            said = [word.value if isinstance(word, ast.Constant) else None for word in words]
            for before, word, after in zip(["", *said], said, said[1:], strict=False):
                if isinstance(word, str) and SHELLS.fullmatch(word) and re.fullmatch(r"-\w*c", str(after)):
                    yield "a shell's -c"
                elif re.fullmatch(r"-\w*c|-S", str(word)) and after is None and not SHELLS.fullmatch(str(before)):
                    yield f"{word} and a computed text"
        case ast.Dict(keys=keys):
            given = [key.value for key in keys if isinstance(key, ast.Constant)]
            yield from (f"{word!r}: in a table of keywords" for word in given if word in KEYWORDS)
        case ast.Subscript(value=ast.Attribute() as table) if in_full(table, names) == "sys.modules":
            yield "sys.modules[…]"
        case ast.Call():
            yield from faults_of_call(node, names)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            reads = any(in_full(call.func, names) == "h5py.File" and opens_to_read(call) for call in calls)
            looks = any(word.arg == "getlink" for call in calls for word in call.keywords)
            if reads and not (looks or any(in_full(call.func, names) == "data_prep.hdf5.native" for call in calls)):
                yield "h5py.File read without a look at its links"


def faults_of_call(call: ast.Call, names: Names) -> Iterator[str]:
    full, said = in_full(call.func, names), {keyword.arg: keyword.value for keyword in call.keywords}
    if isinstance(call.func, ast.Name) and call.func.id in BUILTINS:
        yield call.func.id
    for name, value in said.items():
        if (
            name is not None
            and name in KEYWORDS
            and not (isinstance(value, ast.Constant) and value.value is KEYWORDS[name])
        ):
            yield f"{name}="
    if full in IN_FULL and (len(call.args) > IN_FULL[full] or None in said):
        yield f"{full} with * or too many plain arguments"
    if full == "torch.load" and "weights_only" not in said:
        yield "torch.load without weights_only=True"
    if re.fullmatch(r"subprocess\.(run|Popen|call|check_\w+)", full) and len(call.args) > 1:
        yield f"{full} with more than one plain argument"
    if isinstance(call.func, ast.Attribute) and call.func.attr == "extract":
        yield "extract"
    if full in WITH_CONSTANT and not (call.args and all(map(within_reach, call.args))):
        yield f"a computed {full.rpartition('.')[2]}"


def within_reach(argument: ast.expr) -> bool:
    """A constant, or a module of our own packages."""
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else None
    ours = isinstance(first, ast.Constant) and str(first.value).startswith(("pipeline.", "data_prep."))
    return ours or isinstance(argument, ast.Constant)


def opens_to_read(call: ast.Call) -> bool:
    mode = next((word.value for word in call.keywords if word.arg == "mode"), [*call.args, None, None][1])
    return not (isinstance(mode, ast.Constant) and mode.value in ("w", "x"))


def unsafe(full: str) -> bool:
    return full.rpartition(".")[2] in ANYWHERE or any(re.fullmatch(pattern, full) for pattern in RESOLVED)


def unsafe_module(name: str) -> bool:
    return name in MODULES or any(name.startswith(f"{module}.") for module in MODULES)


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.slow
def test_the_packages_hold_nothing_unsafe() -> None:
    found = [(str(path.relative_to(ROOT)), fault) for path in files() for fault in faults_in(path.read_text())]
    excused = {(name, fault) for name, fault in found if fault.partition(": ")[2] == ALLOWED.get(name, ("",))[0]}
    assert not set(found) - excused, "\n".join(f"{name}:{fault}" for name, fault in found)
    assert {name for name, _ in excused} == set(ALLOWED), "an exception that nothing needs"
    assert len(files()) > 60


HANDED_ON = (
    *("(o := os)", "[os][0]", "{'a': os}['a']", "(os if x else None)", "(None or os)", "f(os)"),
    *(
        "o: Any = os\no",
        "a, *b = os, 1\na",
        "(a, b), c = (os, 1), 2\na",
        "for o in [os]: pass\no",
        "self.o = os\nself.o",
    ),
)
HELD = (
    *("def f(x, o=os): o.system(x)", "def f(): return os\nf().system('x')", "[o.system('x') for o in (os,)]"),
    *("class A:\n    o = os\nA.o.system('x')", "match os:\n    case o: o.system('x')", "getattr(os, 'sys' + 'tem')(x)"),
)
UNSAFE = (
    *(f"import {name}" for name in sorted(MODULES)),
    *(f"import {name} as harmless, os" for name in sorted(MODULES)),
    *(f"thing.{name}(x)" for name in sorted(ANYWHERE)),
    *(f"from thing import {name} as harmless" for name in sorted(ANYWHERE)),
    *(f"{name}(text)" for name in sorted(BUILTINS)),
    *(f"f({name}=value)" for name in KEYWORDS),
    *(f"{name}(variable)" for name in sorted(WITH_CONSTANT)),
    *("from pickle import loads", "def f():\n    import _pickle", "importlib.import_module('pickle')"),
    *("from torch.distributed import checkpoint", "from torch.distributed.checkpoint import load", "dcp.load(state)"),
    *("run = eval", "builtins.exec(text)", "def f(eval):\n    return eval(text)", "import builtins as b\nb.eval(x)"),
    *("os.system('ls')", "from os import system", "from os import system as s\ns('ls')", "os.popen('ls')"),
    *("os.execvp(name, words)", "os.execl('/bin/sh', 'sh')", "from os import execv", "os.spawnlp(0, x)"),
    *("import os as o\no.posix_spawn(a, b, c)", "subprocess.run('ls', shell=True)"),
    *("subprocess.run(['bash', '-c', text])", "words = ('/bin/sh', '-c', text)", "run(['ssh', 'bash', '-lc', text])"),
    *("yaml.load(text)", "import yaml as y\ny.unsafe_load(text)", "from yaml import load", "yaml.UnsafeLoader"),
    *("torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=safe)"),
    *("torch.load(path, **options)", "torch.jit.load(path)", "from torch import load", "from torch import load as r"),
    *(
        "import torch as t\nt.load(path)",
        "t = torch\nt.load(path)",
        "read = torch.load\nread(path)",
        "map(torch.load, paths)",
    ),
    *("torch.load(path, None, pickle, weights_only=True)", "from torch import *", "torch.ops.load_library(path)"),
    *("np.load(path, allow_pickle=True)", "import numpy as n\nn.load(path, None, True)", "np.load(path, None, True)"),
    *("from numpy import load", "np.fromregex(path, text, kind)"),
    *("def f():\n    from mpi4py import MPI\n    MPI.COMM_WORLD.gather(x)", "world.bcast(item)"),
    *("from mpi4py import MPI\nw, n = MPI.COMM_WORLD, 2\nw.send(x, 1)", "from mpi4py import MPI as M\nM.x.recv()"),
    *("import multiprocessing as m\nm.Queue()", "context.Pipe()", "from multiprocessing.connection import Client"),
    *(
        "ctypes.CDLL(path)",
        "from ctypes import CDLL\nCDLL(path)",
        "from importlib import import_module\nimport_module(x)",
    ),
    *("importlib.import_module(f'{room}.x')", "tarfile.open(path).extractall(folder)"),
    *("def f():\n    h5py.File(path)['x']", "def f():\n    from h5py import File as F\n    F(path, 'r')['x']"),
    *("getattr(torch, 'load')(path)".replace("getattr", "import torch\ngetattr"), "import os\nvars(os)['system']('x')"),
    *(f"import os\n{text}.system('x')" for text in HANDED_ON),
    *(f"import os\n{text}" for text in HELD),
    *("import shutil\nshutil.os.system('x')", "import os.path as q\nq.os.system('x')", "os.__dict__['system']('x')"),
    *("__builtins__['eval'](text)", "globals()['__builtins__']", "import sys\nsys.modules['os']", "sys.path.append(x)"),
    *("subprocess.run(['sh'] + ['-c', text])", "run(['sh', *['-c', text]])", "run(x, executable='/bin/sh')"),
    *("run([sys.executable, '-c', text])", "run(['env', '-S', text])"),
    *("subprocess.run(text, **{'shell': True})", "subprocess.run(x, -1, None, None, None, None, None, True, True)"),
    *("torch.serialization.load(path)", "from torch.serialization import load", "torch.hub.load(a, b)"),
    *("torch.export.load(path)", "torch.utils.cpp_extension.load(x)", "np.lib.npyio.load(path, None, True)"),
    *("import numpy as np\nnp.lib.format.read_array(f, True)", "from numpy import loads", "ctypes.cdll[path]"),
    *(
        "h5py.File(path)['x']",
        "class A:\n    f = h5py.File(path)",
        "g = lambda p: h5py.File(p)['x']",
        "h5py.h5f.open(p)",
    ),
    *("asyncio.create_subprocess_exec('sh', '-c', x)", "tarfile.open(p).extract(m, folder)"),
    *("g = [lambda: eval]", "import importlib.util as u\nu.spec_from_file_location('x', path)"),
    *("executor.submit(function)", "super().submit(function)", "submitit.AutoExecutor(folder)"),
    *("from submitit.core.utils import DelayedSubmission", "import submitit.core.utils as u\nu.pickle_dump(x, y)"),
)
SAFE = (
    *("re.compile('a')", "torch.load(path, map_location='cpu', weights_only=True)", "np.load(path)"),
    *("np.load(path, allow_pickle=False)", "subprocess.run(['ls'], shell=False)", "dist.broadcast(tensor, 0)"),
    *("world.Allgather(a, b)", "from mpi4py import MPI\nMPI.COMM_WORLD.Allgather(a, b)", "dist.reduce(x)"),
    *("queue.submit(path, words)", "submitit.SlurmExecutor.__init__", "json.loads(text)", "class C:\n    eval: str"),
    *("def f(*, eval: Path):\n    return read(eval)", "model.eval()", "loader.exec_module(module)", "queue.Queue(3)"),
    *("no_pickle = 'not a pickle, no eval()'", "yaml.safe_load(text)", "ctypes.CDLL(None)", "['bash', path]"),
    *("importlib.import_module('apex')", "importlib.import_module(f'pipeline.{room}')", "h5py.File('x', 'w')"),
    "def f():\n    with h5py.File(path, 'r') as file:\n        file.get('x', getlink=True)",
)


@pytest.mark.parametrize("source", UNSAFE)
def test_every_unsafe_way_is_seen(source: str) -> None:
    assert list(faults_in(source))


@pytest.mark.parametrize("source", SAFE)
def test_safe_code_is_let_through(source: str) -> None:
    assert not list(faults_in(source))


@pytest.mark.parametrize("pattern", RESOLVED)
def test_every_pattern_is_needed(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RESOLVED", [other for other in RESOLVED if other != pattern])
    assert any(not list(faults_in(source)) for source in UNSAFE)
