"""No FP8: the contexts do nothing."""

import contextlib


@contextlib.contextmanager
def fp8_autocast(**options):
    assert not options.get("enabled")
    yield


fp8_model_init = fp8_autocast


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False

    @staticmethod
    def get_fp8_recipe():
        return None
