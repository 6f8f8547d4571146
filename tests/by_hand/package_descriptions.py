"""Summarization on texts that its default was not made for: descriptions of packages, and their one-line synopses.

    python tests/by_hand/package_descriptions.py /tmp/packages     # reads what this Debian or Ubuntu has installed
    ./launch.sh summarization --dataset /tmp/packages --text_column description --summary_column synopsis

Versions of one source package are in one split, and so are equal synopses.
"""

import hashlib
import json
import sys
from pathlib import Path

STATUS = Path("/var/lib/dpkg/status")
LEAST_WORDS = 20  # of a description: a shorter one says what the synopsis says


def packages(text: str) -> list[dict[str, str]]:
    """source, description and synopsis of each package that has a description of its own."""
    found: dict[str, dict[str, str]] = {}
    for paragraph in text.split("\n\n"):
        fields, name = dict[str, str](), ""
        for line in paragraph.splitlines():
            if line.startswith(" "):
                fields[name] += "\n" + ("" if line.strip() == "." else line.strip())
            else:
                name, _, fields[name] = line.partition(": ")
        synopsis, _, description = fields.get("Description", "").partition("\n")
        if len(description.split()) >= LEAST_WORDS:
            source = fields.get("Source", fields["Package"]).partition(" ")[0]
            found.setdefault(description, {"source": source, "description": description, "synopsis": synopsis})
    return list(found.values())


def split_of(source: str) -> str:
    number = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=4).digest(), "big") % 20
    return {0: "validation", 1: "test", 2: "test", 3: "test"}.get(number, "train")


def main(folder: str) -> None:
    rows = packages(STATUS.read_text(encoding="utf-8"))
    split_of_synopsis = {row["synopsis"]: split_of(row["source"]) for row in rows}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        part = [row for row in rows if split == split_of_synopsis[row["synopsis"]] == split_of(row["source"])]
        lines = [json.dumps({name: row[name] for name in ("description", "synopsis")}) + "\n" for row in part]
        (Path(folder) / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(part)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
