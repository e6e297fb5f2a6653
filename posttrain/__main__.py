import signal
import sys

from posttrain.cli import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        # The work is done: Ctrl-C while the interpreter ends would leave a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
