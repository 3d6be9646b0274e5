"""The toys lie beside the tests, so that workers of Ray can import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
