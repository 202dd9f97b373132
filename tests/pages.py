"""The repository's pages: which there are, what stands in them, and the trees of their folders.

`python -m tests.pages` brings every tree up to date after files came, went or moved: comments stay with their file's
name, and a new module gets the beginning of its docstring. Knows nothing of what the code does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("service", "steering", "training", "deploy")
PAGES = ("README.md", *(f"{folder}/README.md" for folder in FOLDERS))
ANNEXES = ("deploy/scaling.md", "service/limits.md")
"""What would make a page too long; the tutorial is run whole."""
MAX_LINE = 120
"""Characters; a row of a table may be longer."""
TREE = re.compile(r"(?<=\n## Where things are\n\n)```\n((?:.*\n)*?)```\n")
FENCED = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language ('' where none is said) and content of what stands between fences; trees are none."""
    return FENCED.findall(_without_fences_of_trees(text))


def commands(text: str) -> list[str]:
    """Lines of fenced blocks (continued ones joined), and code within sentences, tables and comments of trees."""
    lines = [line for _, code in code_blocks(text) for line in code.replace("\\\n", " ").splitlines()]
    prose = FENCED.sub("", _without_fences_of_trees(text))
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def _without_fences_of_trees(text: str) -> str:
    return TREE.sub(lambda tree: tree[0].replace("```\n", ""), text)


def sections(text: str) -> dict[str, str]:
    """Heading of the second level to what stands under it."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def comments_in(tree: str) -> dict[str, str]:
    """Path in a tree to its comment; two spaces of indentation are one level, a folder ends in a slash."""
    stack: list[str] = []
    comments = {}
    for line in tree.splitlines():
        name, _, comment = line.partition(" # ")
        del stack[(len(name) - len(name.lstrip())) // 2 :]
        stack.append(name.strip())
        comments["".join(stack)] = comment.strip()
    return comments


def tree_of(folder: Path, old: str = "") -> str:
    """The annotated tree of a folder; `old` lends its comments.

    Shown are all files but `__init__.py` and the folder's own page. Beside modules a folder without any is one line.
    """
    known = comments_in(old)
    moved = {Path(path).name: comment for path, comment in known.items() if not (folder / path).exists()}
    entries = [
        ("  " * (relative.count("/") - relative.endswith("/")), path, known.get(relative) or moved.get(path.name))
        for path in _entries(folder, data_is_one_line=any(folder.rglob("*.py")))
        for relative in [path.relative_to(folder).as_posix() + "/" * path.is_dir()]
    ]
    names = [f"{indentation}{path.name}{'/' * path.is_dir()}" for indentation, path, _ in entries]
    width = max(map(len, names))
    return "".join(
        f"{name:{width}} # {comment or _first_words(path)}".rstrip(" #") + "\n"
        for name, (_, path, comment) in zip(names, entries, strict=True)
    )


def _entries(folder: Path, *, data_is_one_line: bool, top: bool = True) -> Iterator[Path]:
    """Files before folders, what is not Python before modules, each by name."""
    inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__", "__init__"))]
    for path in sorted(inside, key=lambda path: (path.is_dir(), path.suffix == ".py", path.name)):
        if path.is_dir():
            if any(file.is_file() and "__pycache__" not in file.parts for file in path.rglob("*")):
                yield path
                if any(path.glob("*.py")) or not data_is_one_line:
                    yield from _entries(path, data_is_one_line=data_is_one_line, top=False)
        elif not (top and path.name == "README.md"):
            yield path


def _first_words(path: Path) -> str:
    """How the docstring of a module or a package begins, up to its first stop."""
    source = path / "__init__.py" if path.is_dir() else path
    if source.suffix != ".py" or not source.exists():
        return ""
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return re.split(r"[:;.](?:\s|$)", docstring)[0]


def with_tree(page: str) -> str:
    """The page's text with its tree as it is on disk."""
    text = read(page)
    return TREE.sub(lambda old: f"```\n{tree_of((ROOT / page).parent, old[1])}```\n", text)


if __name__ == "__main__":
    for each in PAGES:
        (ROOT / each).write_text(with_tree(each), encoding="utf-8")
