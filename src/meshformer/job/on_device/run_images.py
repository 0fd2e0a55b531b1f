# pyright: reportMissingImports=false
"""Tells the class of an image: python run.py IMAGE.npy, an array (height, width[, colours]) with values in 0 ... 1, of the size that the model
was trained on. Needs ai-edge-litert and numpy."""

import json
import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

here = Path(__file__).parent
model = Interpreter(str(here / "model.tflite"))
image = np.load(sys.argv[1], allow_pickle=False).astype(np.float32).reshape(model.get_input_details()[0]["shape"])
if (here / "pixels.json").exists():  # mean and deviation over the training images; without the file, the pixels must be normalised already
    pixels = json.loads((here / "pixels.json").read_text())
    image = (image - pixels["mean"]) / pixels["deviation"]
(output,) = model.get_signature_runner("serving_default")(images=image).values()
names = (here / "labels.txt").read_text(encoding="utf-8").splitlines() if (here / "labels.txt").exists() else None
print(names[output[0].argmax()] if names else int(output[0].argmax()))
