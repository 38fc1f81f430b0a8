"""The rules of CONTRIBUTING.md about files, rooms, functions and imports, read from the code itself."""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT_LINES = {
    "train_qlora.py": 350,
    "compare.py": 300,
    "check.py": 300,
    "merge.py": 250,
    "serve.py": 150,
    "download_model.py": 100,
}
ROOMS = ["system", "data", "model", "training", "inference", "serving"]  # each imports from those before it
RECIPE_NAMES = {
    *("RECIPE", "OUTPUT_DIR", "DATA_PATH", "load_data", "preprocess_function"),
    *("quantization_config", "lora_config"),
}
GIVEN_SIGNATURES = {"extract_tool_calls_streaming"}  # another library calls it so: vLLM
FILE_LINES, FUNCTION_LINES, PARAMETERS, INNER_IMPORTS = 400, 70, 6, 25

SCRIPTS = [ROOT / name for name in SCRIPT_LINES]
TUNER = sorted((ROOT / "tuner").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
CODE = [*SCRIPTS, *TUNER, *BENCHMARKS]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path):
    """Return {(module, name), …} of all imports in a file, at any depth; the name is None for a module."""
    pairs = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            pairs |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import"
            pairs |= {(node.module, alias.name) for alias in node.names}
    return pairs


def test_the_roots_python_files_are_the_six_scripts():
    assert {path.name for path in ROOT.glob("*.py")} == set(SCRIPT_LINES)


@pytest.mark.parametrize(("script", "limit"), SCRIPT_LINES.items())
def test_a_script_is_read_at_one_sitting(script, limit):
    assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) <= limit


def test_no_file_of_the_package_is_longer_than_four_hundred_lines():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in TUNER}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_no_function_is_long_or_takes_many_parameters():
    too_much = []
    for path in CODE:
        for node in ast.walk(parse(path)):
            if not isinstance(node, FUNCTIONS) or node.name in GIVEN_SIGNATURES:
                continue
            arguments = node.args
            parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parameters += filter(None, [arguments.vararg, arguments.kwarg])
            parameters = [one for one in parameters if one.arg not in ("self", "cls", "_")]
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES or len(parameters) > PARAMETERS:
                too_much.append(f"{name_of(path)}: {node.name}: {lines} lines, {len(parameters)} parameters")
    assert too_much == []


def test_rooms_import_downward_only():
    assert {path.parent.name for path in TUNER if path.parent.name != "tuner"} == set(ROOMS)
    upward = []
    for path in TUNER:
        if path.parent.name == "tuner":
            continue
        for module, name in imported(path):
            parts = [*module.split("."), *([name] if name else [])]
            room = parts[1] if parts[0] == "tuner" else None
            if room and ROOMS.index(room) > ROOMS.index(path.parent.name):
                upward.append(f"{name_of(path)}: {'.'.join(parts)}")
    assert upward == []


def test_no_modules_import_one_another_in_a_circle():
    modules = {name_of(path).removesuffix(".py").replace("/", "."): path for path in TUNER}
    needs = {
        module: {m for m in modules for a, b in imported(path) if m in (a, f"{a}.{b}")}
        for module, path in modules.items()
    }
    while leaves := {module for module, others in needs.items() if not others}:
        needs = {module: others - leaves for module, others in needs.items() if module not in leaves}
    assert needs == {}, "a circle of imports is among these"


def test_nothing_in_the_package_imports_a_script_tests_or_benchmarks():
    forbidden = {Path(script).stem for script in SCRIPT_LINES} | {"tests", "benchmarks"}
    wrong = [
        f"{name_of(path)}: {module}"
        for path in TUNER
        for module, _ in imported(path)
        if module.split(".")[0] in forbidden
    ]
    assert wrong == []


def test_scripts_import_only_the_recipe_from_one_another():
    names = {Path(script).stem for script in SCRIPT_LINES}
    wrong = []
    for path in [*SCRIPTS, *BENCHMARKS]:
        for module, name in imported(path):
            if module in names and not (module == "train_qlora" and name in RECIPE_NAMES):
                wrong.append(f"{name_of(path)}: {module}.{name}")
    assert wrong == []


def inner_imports(tree):
    """Return [(import, whether it stands `with heavy_imports()`, …)] of all imports in functions."""
    pairs = []

    def visit(node, in_function, in_place):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            pairs.extend([(node, in_place)] * in_function)
            return
        if isinstance(node, ast.With):
            calls = [item.context_expr.func for item in node.items if isinstance(item.context_expr, ast.Call)]
            names = {getattr(call, "attr", getattr(call, "id", None)) for call in calls}
            in_place = in_place or bool({"heavy_imports", "without_torch"} & names)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function or isinstance(node, FUNCTIONS), in_place)

    visit(tree, False, False)
    return pairs


def test_few_imports_stand_in_functions_and_each_says_why():
    count, unexplained = 0, []
    for path in CODE:
        source = path.read_text(encoding="utf-8")
        comments = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        pairs = inner_imports(ast.parse(source))
        count += len(pairs)
        lines = {node.lineno for node, _ in pairs}
        for node in (node for node, in_place in pairs if not in_place):
            first = node.lineno
            while first - 1 in lines:  # a reason stands above the first of several
                first -= 1
            if not comments & {node.lineno, node.end_lineno, first - 1}:
                unexplained.append(f"{name_of(path)}:{node.lineno}")
    assert unexplained == []
    assert count <= INNER_IMPORTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_one_place_for_heavy_imports(script):
    calls = [
        node
        for node in ast.walk(parse(script))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", None)) == "heavy_imports"
    ]
    assert len(calls) <= 1


def test_no_test_file_imports_another():
    wrong = [
        f"{name_of(path)}: {module}.{name}"
        for path in (ROOT / "tests").rglob("*.py")
        for module, name in imported(path)
        if re.match(r"tests\.(.*\.)?test_", f"{module}.{name}")
    ]
    assert wrong == []


def test_tests_stand_in_the_rooms():
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= {*ROOMS, "scripts"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170
