"""Optimisers with parameter groups chosen by name, and learning-rate schedules."""

from meshformer.optim.factories import adamw, muon, sgd
from meshformer.optim.groups import decay_groups, split_matrices
from meshformer.optim.muon import MuonAdamW, orthogonalise
from meshformer.optim.schedules import constant, cosine, linear, of_the_module, wsd

__all__ = [
    "MuonAdamW",
    "adamw",
    "constant",
    "cosine",
    "decay_groups",
    "linear",
    "muon",
    "of_the_module",
    "orthogonalise",
    "sgd",
    "split_matrices",
    "wsd",
]
