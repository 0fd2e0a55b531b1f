"""Parallel layouts of a model over processes. Models and tasks do not import this package; the strategies apply a layout to them."""
