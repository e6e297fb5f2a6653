"""Run an example under torchrun, and free its process groups before the interpreter ends.

Threads of gloo that free tensors while the interpreter ends abort the process (pytorch#179291), and
reference cycles of FSDP2 keep process groups that an example has destroyed until then.
"""

import gc
import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
gc.collect()
