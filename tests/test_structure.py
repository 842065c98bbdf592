"""The shape of the source: small files and functions, imports that point downward, no torch on the device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src" / "packlight"
FILES = sorted(SRC.rglob("*.py"))
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("rans", "npm", "heap", "sinusoids", "trellis"),
    ("chunks",),
    (
        "plan",
        "target",
        "certificate",
        "report",
        "report_*",
        "terminal",
        "bundle",
        "codec",
        "audio",
        "byte_pairs",
        "context",
        "images",
        "sounds",
        "texts",
        "metrics",
        "retrieval",
    ),
    ("patches", "rows", "viterbi"),
    ("quant", "vocabulary", "vocabulary_*", "families", "families.*", "packing", "windows"),
    ("convolutions", "static", "designing", "narrow_attention"),
    ("structure", "pruning", "turning"),
    ("layers", "training", "distilling"),
    ("listing", "observe", "information", "lessons", "model", "saved_tables", "waves"),
    ("data", "inheriting"),
    ("techniques", "techniques.*", "runtimes", "runtimes.*", "serving", "serving.*"),
    ("tables",),
    (
        "loading",
        "sensitivity",
        "fewer_tokens",
        "ranging",
        "planner",
        "compress",
        "recovering",
        "restructuring",
        "token_pruning",
        "searching",
        "pruning_effects",
        "pruning_plan",
        "evaluate",
        "scoring",
        "deploy",
        "serve",
        "measure",
        "profiling",
        "reloading",
        "unpacking",
        "verdict",
        "result",
        "web_*",
    ),
    ("applying", "inspecting", "benching", "answering", "freezing", "speeding", "teaching"),
    ("web",),
    ("fitting",),
    ("sweeping", "cli_web"),
    ("cli", "__init__"),
    ("__main__",),
)
LIGHT = ("packlight", "packlight.cli", "packlight.serve", "packlight.bundle", "packlight.codec", "packlight.plan")
HEAVY = ("torch", "transformers", "onnx", "onnxscript")


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(SRC).with_suffix("").parts)
    return name if name == "__init__" else name.removesuffix(".__init__")


def level(module: str) -> int:
    from fnmatch import fnmatchcase

    found = [i for i, names in enumerate(LAYERS) if any(fnmatchcase(module, n) for n in names)]
    assert len(found) == 1, f"{module} belongs to no layer; give it one in LAYERS"
    return found[0]


def imports(path: Path) -> set[str]:
    """Modules of packlight that a file imports when it runs, anywhere in it."""
    modules = {module_name(f) for f in FILES}
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("packlight.") for a in node.names if a.name.startswith("packlight.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            if node.module == "packlight":
                found |= {a.name for a in node.names if a.name in modules}
            elif node.module and node.module.startswith("packlight."):
                base = node.module.removeprefix("packlight.")
                inner = {f"{base}.{a.name}" for a in node.names} & modules
                found |= inner or {base}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_have_four_hundred_lines_at_most(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_are_short_and_take_seven_parameters_at_most(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg != "self"]
            names += [a.arg for a in (given.vararg, given.kwarg) if a]
            # A command of the command line has one parameter for each of its options.
            command = path.name == "cli.py" and bool(node.decorator_list)
            assert command or len(names) <= 7, f"{node.name} has {len(names)} parameters"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downward(path: Path) -> None:
    own = level(module_name(path))
    upward = {m for m in imports(path) if level(m) > own}
    assert not upward, f"{module_name(path)} (layer {own}) imports {sorted(upward)} from above"


def test_imports_have_no_cycle() -> None:
    graph = {module_name(f): imports(f) - {module_name(f)} for f in FILES}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", LIGHT)
def test_the_device_side_imports_no_torch(name: str) -> None:
    if name == "packlight.cli" and not (SRC / "cli.py").is_file():
        pytest.skip("there is no command line yet")
    code = f"import sys, {name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SRC.parent)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
