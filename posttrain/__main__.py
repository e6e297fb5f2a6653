import sys

from posttrain.cli import main
from pretrain.runtime import stopping

if __name__ == "__main__":
    with stopping.without_traceback():
        sys.exit(main())
