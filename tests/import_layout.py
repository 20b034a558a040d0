"""Who imports whom in mta_fast, in numbers: between folders, and where the arrows run in a circle.

python tests/import_layout.py [CHECKOUT]
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import grimp
import networkx

PACKAGE = "mta_fast"


def room(module: str, folders: set[str]) -> str:
    """The folder that a module lies in; one that lies beside folders stands for itself."""
    home = module if module in folders else module.rpartition(".")[0]
    return module if any(folder.startswith(home + ".") for folder in folders) else home


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups of names that all reach each other."""
    found = networkx.strongly_connected_components(networkx.DiGraph(list(edges)))
    return sorted((sorted(group) for group in found if len(group) > 1), key=len, reverse=True)


def main(checkout: Path) -> None:
    """Print the layout of the package in ``checkout``."""
    sys.path.insert(0, str(checkout))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    folders = {module for module in graph.modules if graph.find_children(module)}
    imports = [(one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one)]
    between = Counter((room(one, folders), room(other, folders)) for one, other in imports)
    for name in sorted({room(module, folders) for module in graph.modules}):
        others = sorted((other, count) for (one, other), count in between.items() if one == name != other)
        print(f"{name}: " + (", ".join(f"{other.removeprefix(PACKAGE + '.')} {n}" for other, n in others) or "nothing"))
    for what, edges in (("folders", [edge for edge in between if edge[0] != edge[1]]), ("modules", imports)):
        found = circles(edges)
        print(f"circles of {what}: {len(found)}")
        for group in found:
            print("  " + ", ".join(name.removeprefix(PACKAGE + ".") for name in group))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
