"""The corpus `python-docs`, made from the Python that runs: the language's topics and the library's docstrings.

Decides what a document of it is: one topic, or one module with the docstrings of what stands in it. Sources are read
as syntax trees and never imported, so the same Python gives the same bytes.
"""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ratoon.base.errors import ArtifactError
from ratoon.store.atomic import atomic_file

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_TOPICS = Path("pydoc_data", "topics.py")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def write_python_docs(path: Path) -> int:
    """Write the corpus to `path` as JSON lines `{title, text}`; returns the number of documents.

    Raises `ArtifactError` for a Python that came without its sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    count = 0
    with atomic_file(path) as handle:
        for title, text in (*_topics(library / _TOPICS), *_modules(library)):
            handle.write((json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n").encode())
            count += 1
        if count == 0:
            raise ArtifactError(
                "this Python came without topics and without the sources of its library",
                where=library,
                expected="pydoc_data/topics.py and the modules as .py files",
                fix="use a Python that has them, or train on another text (data.sources=[…])",
            )
    return count


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = _parse(path)
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "topics":
            for topic, text in sorted(ast.literal_eval(statement.value).items()):
                yield topic, text.strip() + "\n"


def _modules(library: Path) -> Iterator[tuple[str, str]]:
    paths = [path for path in library.rglob("*.py") if not _SKIPPED & set(path.relative_to(library).parts)]
    for path in sorted(paths, key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = _parse(path)
        said = list(_docstrings(tree, name)) if tree else []
        if said:
            yield name, "\n\n".join(said) + "\n"


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a source; none for a file that is absent or, like lib2to3's examples, not Python 3."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings: nobody here can mend the library
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _docstrings(node: Documented, name: str) -> Iterator[str]:
    """The heading and docstring of `node` and of everything in it that is not inside a function."""
    said = ast.get_docstring(node)
    if said and said.strip():
        heading = name
        if isinstance(node, ast.ClassDef):
            heading = f"class {name}({', '.join(map(ast.unparse, node.bases))})" if node.bases else f"class {name}"
        elif not isinstance(node, ast.Module):
            heading = f"{name}({ast.unparse(node.args)})"
        yield f"{heading}\n\n{_indented(said, 0 if isinstance(node, ast.Module) else 4)}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(inner, f"{name}.{inner.name}")


def _indented(text: str, spaces: int) -> str:
    lines = inspect.cleandoc(text).splitlines()
    return "\n".join((" " * spaces + line).rstrip() for line in lines)
