"""Imports run downward only, in no circle inside a room; core/ alone names mesh axes."""

import ast
import pathlib

import pytest

from tinylm.core.mesh import AXES

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "tinylm"
STOREYS = {
    "core": 1,
    "data": 2,
    "model": 2,
    "inference": 3,
    "run": 3,
    "view": 4,
    "interop": 4,
    "train": 5,
    "tools": 6,
}
COMMANDS = 7
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> tuple[str, int]:
    """Return (room, storey) of a module of ours; commands are on the highest storey."""
    room = module.split(".")[1] if "." in module else ""
    return room, STOREYS.get(room, COMMANDS)


def module_of(path: pathlib.Path) -> str:
    """Return the name under which a file of ours is imported; a package's is that of its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: pathlib.Path):
    """Yield the modules of ours that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("tinylm"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinylm"):
            assert node.level == 0
            for alias in node.names:
                place = PACKAGE.parent / node.module.replace(".", "/") / alias.name
                is_module = place.is_dir() or place.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    own = module_of(path)
    if path == PACKAGE / "__init__.py":
        return  # gives open_run to those outside; no room imports it for more than the version
    room, storey = room_of(own)
    for module in imports(path):
        other, below = room_of(module)
        if module == "tinylm":
            continue
        assert below < storey or other == room or below == storey == COMMANDS, (
            f"{own} imports {module}"
        )
        if storey == 2:
            assert other in (room, "core"), (
                f"{own} imports {module}: model/ and data/ know nothing of each other"
            )


def reachable(start: str, imported: dict[str, set[str]]) -> set[str]:
    """Return the modules that `start` imports, and those that these import, and so on."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for module in imported.get(waiting.pop(), set()) - found:
            found.add(module)
            waiting.append(module)
    return found


@pytest.mark.parametrize("room", STOREYS)
def test_no_circle_of_imports_inside_a_room(room):
    """Imports inside functions count too: they hide a circle, and don't end it."""
    files = sorted((PACKAGE / room).rglob("*.py"))
    imported = {module_of(path): set(imports(path)) for path in files}
    in_circles = {module for module in imported if module in reachable(module, imported)}
    assert not in_circles


def test_a_circle_is_found():
    imported = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}
    assert {module for module in imported if module in reachable(module, imported)} == set("abc")


# What places arrays or names an axis of the mesh; the rest of the package names logical axes.
CORE_ALONE = {
    "NamedSharding",
    "P",
    "PartitionSpec",
    "all_gather",
    "axis_index",
    "psum",
    "psum_scatter",
    "shard_map",
}


def name_of(node: ast.expr) -> str:
    """Return the last name of an expression such as `jax.sharding.Mesh` or `self._mesh`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def spells_mesh_axes(node: ast.AST) -> bool:
    """Say whether a node of the syntax tree names axes of the mesh.

    "data" and "model" are sections of the config too, so each alone says nothing.
    """
    if isinstance(node, ast.Constant):
        return node.value == AXES.replica
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        texts = {entry.value for entry in node.elts if isinstance(entry, ast.Constant)}
        return len(texts.intersection(AXES)) > 1
    if isinstance(node, ast.Attribute):
        of_mesh = name_of(node.value).lower().endswith("mesh")
        return node.attr == "axis_names" or (node.attr == "shape" and of_mesh)
    return isinstance(node, ast.Call) and name_of(node.func) in CORE_ALONE


@pytest.mark.parametrize(
    "line",
    [
        "axes = ('data', 'model')",
        "axis = 'replica'",
        "for name in mesh.axis_names: pass",
        "sizes = dict(self._mesh.shape)",
        "sharding = jax.sharding.NamedSharding(mesh, spec)",
        "total = jax.lax.psum(x, axes)",
    ],
)
def test_a_name_of_a_mesh_axis_is_found(line):
    assert any(spells_mesh_axes(node) for node in ast.walk(ast.parse(line)))


def test_only_core_names_mesh_axes():
    for path in FILES:
        if path.parent.name == "core":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not spells_mesh_axes(node), (
                f"{path}:{node.lineno} names mesh axes, which core/mesh.py alone may"
            )


def test_there_are_files_to_read():
    assert len(FILES) > 20
