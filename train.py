"""The shim behind `python train.py --config kd_llama.yaml`; the installed command is `distill`."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
