import sys

from pretrain.cli import main
from pretrain.runtime import background, stopping

if __name__ == "__main__":
    with background.ending_process(), stopping.without_traceback():
        sys.exit(main())
