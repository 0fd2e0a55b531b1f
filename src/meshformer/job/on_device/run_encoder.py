# pyright: reportMissingImports=false
"""Fills [MASK] in a text, or tells its class where there is a labels.txt: python run.py TEXT. Needs ai-edge-litert, numpy and tokenizers."""

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from tokenizers import Tokenizer

here, POOLING = Path(__file__).parent, "mean"
tokenizer, model = Tokenizer.from_file(str(here / "tokenizer.json")), Interpreter(str(here / "model.tflite"))
length = model.get_input_details()[0]["shape"][1]
ids = tokenizer.encode(sys.argv[1]).ids[:length]
tokens, mask = np.zeros((2, 1, length), np.int32)
tokens[0, : len(ids)], mask[0, : len(ids)] = ids, 1
(output,) = model.get_signature_runner("serving_default")(tokens=tokens, mask=mask).values()
output, hidden = output[0, : len(ids)], tokenizer.token_to_id("[MASK]")
if (here / "labels.txt").exists():
    scores = output[0] if POOLING == "first" else output.mean(axis=0)
    print((here / "labels.txt").read_text(encoding="utf-8").splitlines()[scores.argmax()])
elif output.shape[1] >= tokenizer.get_vocab_size():
    filled = [int(row.argmax()) if i == hidden else i for i, row in zip(ids, output, strict=True)]
    print(tokenizer.decode(filled, skip_special_tokens=False))
else:
    print(output.mean(axis=0).tolist())
