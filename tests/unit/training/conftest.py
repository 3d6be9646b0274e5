"""Helpers lie beside the tests, since scripts in processes of their own use them too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
