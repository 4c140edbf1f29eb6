"""What a check found in a data set: one kind of fault, and every entry that has it."""

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 10  # culprits that a message names


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Attributes:
        text: what is wrong, in the plural, without a full stop.
        culprits: the entries concerned, each as ``id 7 (image 3, 3.jpg)``; empty where the text
            says it all.
        level: "error" (the set cannot be used), "warning" (it was repaired), "note" (worth
            knowing).
    """

    text: str
    culprits: Sequence[str] = ()
    level: str = "error"

    def __str__(self) -> str:
        """One line: the text, the number of culprits, and the first of them."""
        if not self.culprits:
            return self.text
        more = ", ..." if len(self.culprits) > SHOWN else ""
        return f"{self.text} ({len(self.culprits):,}): {', '.join(self.culprits[:SHOWN])}{more}"


def show(value: object, length: int = 60) -> str:
    """A value of a file, short enough for a message and printable everywhere."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= length else text[: length - 3] + "..."


def show_path(path: str) -> str:
    """A path of a file, in full unless it is absurdly long."""
    return show(path, 1000)


def only(findings: Sequence[Finding], *levels: str) -> list[Finding]:
    """The findings of some levels."""
    return [finding for finding in findings if finding.level in levels]


def as_list(findings: Sequence[Finding]) -> str:
    """The findings as the lines of a message."""
    return "\n".join(f"- {finding}" for finding in findings)
