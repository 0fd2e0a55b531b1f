"""Measurements behind the README's figures: long or noisy, so they are commands of their own and never assertions in a test."""
