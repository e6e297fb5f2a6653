"""Errors that are reported to the user in one line."""


class PretrainError(Exception):
    """An error that the user can resolve: the message is one line with the cause and the remedy.

    Every rank of a run raises the same one (see :func:`pretrain.parallel.raise_on_all_ranks`), so
    that no rank waits for another; the command line prints it without a traceback.
    """


class LostRankError(PretrainError):
    """Another rank has ended or does not answer. Ranks that lose it have different messages, and
    the command line prints those of all."""


def one_line(text: str) -> str:
    """Convert a text to one printable line.

    White space becomes single spaces. Control characters, and bytes of a file name that are not
    UTF-8, are written as escapes.
    """
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in " ".join(text.split())
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
