"""One optimizer step: `step.py` from top to bottom, what it asks of a strategy (`protocol.py`), what it notes for the next row (`guard.py`)."""
