"""Where models are."""

import os
from pathlib import Path


def build_model_path(model_id):
    return Path(os.environ["EXO_DEFAULT_MODELS_DIR"]) / model_id.normalize()
