"""The street: which room may import which, and the manners that a reader relies on. Everything is read, nothing run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "trimaran"

# In the order of DESIGN.md. A room may import the rooms before it and itself.
STREET = [
    *("errors", "disk", "config", "report", "ops", "model", "text", "tasks", "data", "parallel", "quant", "train"),
    *("plan", "engine", "serve", "evals", "rl", "compress", "curate", "speech", "studies", "demo"),
]
TORCH_FREE = {"errors", "disk", "config", "report", "text", "tasks"}
# What the doors may import.
DOORS = {"cli": {"errors", "config"}, "__main__": {"cli"}, "__init__": {"model", "text", "engine"}}
LONELY = {"studies"}  # rooms that nobody imports
BROAD_BOUNDARIES = {
    "text/tokenizer.py:backend_of": "the tokenizers library raises plain Exception for a bad file",
    "engine/fenced.py:_ask": "a guide that breaks ends its own request, whatever it raises",
    "engine/runner.py:_pass": "what goes wrong in a pass goes to whoever asked for what was in it, and to nobody else",
    "evals/play.py:guarded": "a task that breaks ends its own episode: recorded with its traceback, and never a score",
    "serve/stream.py:events": "a stream's status has gone out: the client is told in an event, the log has the rest",
}
ATTICS = {"utils", "util", "common", "helpers", "helper", "misc", "base"}

ALLOWED = {room: {room, *STREET[:place]} - LONELY | {room} for place, room in enumerate(STREET)} | DOORS
for free in TORCH_FREE:
    ALLOWED[free] &= TORCH_FREE

PAGES = sorted(SOURCE.rglob("*.py"))
WRITTEN = sorted(page for folder in ("src", "tests", "benchmarks") for page in (ROOT / folder).rglob("*.py"))


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def room_of(page: Path) -> str:
    """The folder under trimaran/, or the name of a file that lies there itself."""
    return page.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def street_faults(room: str, source: str) -> list[str]:
    """What a page of `room` imports against the order."""
    faults = []
    for line, name in imports(ast.parse(source)):
        parts = name.split(".")
        if name.startswith("."):
            faults.append(f"line {line}: relative import {name}")
        elif parts[0] == "trimaran" and (len(parts) < 2 or parts[1] not in ALLOWED[room]):
            faults.append(f"line {line}: {room} imports {name}; it may import {', '.join(sorted(ALLOWED[room]))}")
        elif parts[0] in ("torch", "triton", "transformers") and room in TORCH_FREE | set(DOORS):
            faults.append(f"line {line}: {room} imports {name}, and it is to live without")
    return faults


def calls_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: all but what is inside functions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += node.decorator_list if not isinstance(node, ast.Lambda) else []
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


GLOBAL_CALLS = (
    "torch.set_",
    "torch.manual_seed",
    "torch.use_deterministic",
    "torch.cuda.",
    "torch.backends.",
    "random.seed",
    "numpy.random.seed",
    "np.random.seed",
    "warnings.",
    "logging.basicConfig",
    "signal.signal",
    "atexit.",
    "os.putenv",
    "os.environ.",
    "sys.path.",
    "multiprocessing.set_",
    "torch.multiprocessing.",
    "matplotlib.use",
    "setattr",
)


def import_faults(source: str) -> list[str]:
    """Global state that a module changes by being imported: calls of known setters, assignments into other modules."""
    tree = ast.parse(source)
    foreign = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree) for alias in aliases(node)}
    faults = []
    for node in calls_at_import(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(GLOBAL_CALLS):
            faults.append(f"line {node.lineno}: {ast.unparse(node)} while importing")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, (ast.Attribute, ast.Subscript)) and root_name(target) in foreign:
                faults.append(f"line {target.lineno}: {ast.unparse(target)} is set while importing")
    return faults


def aliases(node: ast.AST) -> list[ast.alias]:
    return node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []


def root_name(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


BROAD = ("Exception", "BaseException")


def broad_handlers(source: str) -> list[tuple[str, int]]:
    """(function, line) of every except that may swallow a bug; cleaning up and raising again swallows nothing."""
    found = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if swallows(node):
            found.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(source), "")
    return found


def swallows(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
        return any(ast.unparse(kind) in BROAD for kind in node.args)
    if not isinstance(node, ast.ExceptHandler):
        return False
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    raised_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
    return any(kind is None or ast.unparse(kind) in BROAD for kind in kinds) and not raised_again


def test_every_page_is_in_a_room():
    strangers = {room_of(page) for page in PAGES} - set(ALLOWED)
    assert not strangers, f"{strangers} are no rooms of the street; add them to DESIGN.md and STREET first"
    assert all(len(page.relative_to(SOURCE).parts) <= 3 for page in PAGES), "rooms are at most two levels deep"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_keeps_to_the_street(page):
    source = page.read_text()
    faults = street_faults(room_of(page), source) + import_faults(source)
    for function, line in broad_handlers(source):
        if f"{page.relative_to(SOURCE)}:{function}" not in BROAD_BOUNDARIES:
            faults.append(f"line {line}: a broad except in {function or 'the module'}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            faults.append(f"line {node.lineno}: a stub; what does not exist is not named")
    assert not faults, f"{named(page)}\n" + "\n".join(faults)


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_a_page_has_a_readable_size(page):
    source = page.read_text()
    assert page.stem not in ATTICS, "name the file after the one thing it holds"
    assert source.count("\n") <= 600
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 80
    ]
    assert not long


@pytest.mark.parametrize("page", [page for page in PAGES if page.stat().st_size], ids=named)
def test_pages_and_classes_say_what_they_are(page):
    tree = ast.parse(page.read_text())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    silent = [node.name for node in classes if not ast.get_docstring(node)]
    assert ast.get_docstring(tree) and not silent


def shared_functions() -> set[tuple[str, str]]:
    """(module, function) of every function that another room imports by name: the doors between rooms."""
    found = set()
    for page in PAGES:
        for _, name in imports(ast.parse(page.read_text())):
            parts = name.split(".")
            if parts[0] == "trimaran" and len(parts) == 4 and parts[1] != room_of(page):
                found.add(("/".join(parts[1:3]), parts[3]))
    return found


def test_functions_between_rooms_have_docstrings():
    silent = []
    for module, name in sorted(shared_functions()):
        page = SOURCE / f"{module}.py"
        for node in ast.parse(page.read_text()).body if page.exists() else []:
            if isinstance(node, ast.FunctionDef) and node.name == name and not ast.get_docstring(node):
                silent.append(f"{module}.py: {name}")
    assert not silent


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        ("ops", "from trimaran.model import hub", "ops imports trimaran.model.hub"),
        ("ops", "def f():\n    import trimaran.train.loop", "line 2"),
        ("ops", "import trimaran", "ops imports trimaran"),
        ("text", "import torch.nn", "to live without"),
        ("text", "from trimaran.model import config", "text imports trimaran.model.config"),
        ("demo", "from trimaran.studies import forward_forward", "studies"),
        ("model", "from . import hub", "relative"),
    ],
)
def test_the_street_test_sees_faults(room, source, fault):
    assert fault in street_faults(room, source)[0]


def test_the_street_test_lets_pass_what_is_right():
    assert not street_faults("engine", "import torch\nfrom trimaran.model.hub import load\nfrom trimaran import report")
    assert not import_faults("import torch\nx = torch.arange(3)\ndef f():\n    torch.set_num_threads(1)")
    assert broad_handlers("try:\n    f()\nexcept (OSError, ValueError):\n    pass") == []
    assert broad_handlers("try:\n    f()\nexcept BaseException:\n    g()\n    raise") == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.set_default_dtype(torch.float64)",
        "import torch\nif True:\n    torch.manual_seed(0)",
        "import torch\ntorch.backends.cudnn.benchmark = True",
        "import os\nos.environ['X'] = '1'",
        "import transformers\ntransformers.PreTrainedModel.save = None",
        "import torch\nclass A:\n    torch.set_num_threads(1)",
    ],
)
def test_the_street_test_sees_side_effects_of_import(source):
    assert import_faults(source)


@pytest.mark.parametrize("clause", ["except:", "except Exception:", "except (OSError, BaseException) as e:"])
def test_the_street_test_sees_broad_excepts(clause):
    assert broad_handlers(f"def f():\n    try:\n        g()\n    {clause}\n        pass") == [("f", 4)]
