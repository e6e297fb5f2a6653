"""The one error that a user is meant to read."""


class PretrainError(Exception):
    """Something the user can put right: the message is one line that names it and the fix.

    Every rank of a run raises the same one (see :func:`pretrain.runtime.processes.agree`), so
    that all leave together; the command line prints it without a traceback.
    """
