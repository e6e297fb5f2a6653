import sys

from pretrain.cli import main
from pretrain.runtime import background

if __name__ == "__main__":
    with background.ending_process():
        sys.exit(main())
