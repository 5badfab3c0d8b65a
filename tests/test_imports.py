"""The modules of eva import each other in one direction, also where they do so only when they need to."""

import ast
import graphlib
from pathlib import Path

import eva

FOLDER = Path(eva.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in FOLDER.glob("*.py")}


def imported(tree: ast.Module) -> set[str]:
    """Returns the modules of eva that a module imports anywhere in it."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("eva.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "eva":
            names |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eva."):
            names.add((node.module or "").partition(".")[2])
    return names


def test_no_module_imports_one_that_imports_it() -> None:
    """By way of others neither; __init__ takes from all."""
    arrows = {name: imported(tree) for name, tree in MODULES.items() if name != "__init__"}
    assert set().union(*arrows.values()) <= set(MODULES)
    assert arrows["cli"] and arrows["experiment"]  # something was found
    order = list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError
    assert order.index("config") < order.index("experiment") < order.index("cli")


def test_only_one_module_knows_each_large_package() -> None:
    """Optuna is behind `search`; W&B is logged to by `tracker` and asked by those that read and publish."""
    users = {
        package: {
            name
            for name, tree in MODULES.items()
            for node in ast.walk(tree)
            if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == package for alias in node.names))
            or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package)
        }
        for package in ("optuna", "torch_lr_finder", "wandb")
    }
    assert users["optuna"] == {"search"}
    assert users["torch_lr_finder"] == {"lr_range"}
    assert users["wandb"] == {"tracker", "wandb_client", "wandb_log", "wandb_runs"}
