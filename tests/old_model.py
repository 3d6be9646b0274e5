"""The tiny random model that the files of earlier versions were made on."""

import json
import shutil
from pathlib import Path

from drllm.config import ModelConfig
from drllm.model.load import BaseModel, load

FIXTURES = Path(__file__).parent / "fixtures"
MODEL = FIXTURES / "3820ce17" / "model"


def load_old_model(folder: Path) -> BaseModel:
    """Copy the model to a new folder, and load it.

    Its tokenizer was written by a class of transformers 5; the copy names one of all versions.
    """
    shutil.copytree(MODEL, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return load(ModelConfig(model=str(folder), device="cpu"))
