"""The exceptions a user should ever see, and how several of them are told together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake the user can mend. Printed without a traceback, one line per problem; exit status 2.

    Each line says where, what, the value, the rule and the way out.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = [" ".join(problem.split()) for problem in problems]
        super().__init__("\n".join(self.problems))


class SharedError(UserError):
    """A user error that every rank raises alike; only rank 0 prints it."""


class LostContact(Exception):
    """Another rank does not answer any more: it died, hangs, or the network between them is cut. `stack`: the lines of
    ours that waited for it. Told by every rank; exit status 1, since the same command may end well."""

    def __init__(self, told: str, stack: list[str]) -> None:
        self.stack = stack
        super().__init__(told)


@contextmanager
def told_as(place: str, ours: str) -> Iterator[None]:
    """User errors in here say `place`, where it stands in what the user wrote, and not `ours`."""
    try:
        yield
    except UserError as error:
        kind = SharedError if isinstance(error, SharedError) else UserError
        raise kind(*(problem.replace(ours, place) for problem in error.problems)) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`Known: Protein, SMILES. Did you mean Protein?` for an unknown `name`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"Known: {', '.join(names) or 'none'}.{hint}"
