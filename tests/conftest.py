"""Which tests share a worker: those of one folder share its clusters, and the real node is one for all.

With `-n 2 --dist loadgroup --no-loadscope-reorder` the folders run beside each other, the longest first.
"""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Folders whose tests need the real node, and after them the others, long ones first.
ON_THE_NODE = ("e2e", "images")
_ORDER = (*ON_THE_NODE, "controlplane", "pipeline", "chart", "cluster", "api")


def folder_of(item: pytest.Item) -> str:
    return item.path.relative_to(HERE).parts[0]


def place(folder: str) -> int:
    return _ORDER.index(folder) if folder in _ORDER else len(_ORDER)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(folder_of(item)))
    for item in items:
        folder = folder_of(item)
        group = "node" if folder in ON_THE_NODE else folder
        if folder == "pipeline":
            group = item.path.stem  # no cluster to share: spread them
        item.add_marker(pytest.mark.xdist_group(group))
