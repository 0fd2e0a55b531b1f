"""One optimizer step: the step itself (`step.py`), the methods it needs from a strategy (`protocol.py`), non-finite values (`guard.py`)."""
