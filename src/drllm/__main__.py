"""`python -m drllm` is the same as `drllm`."""

import sys

from drllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
