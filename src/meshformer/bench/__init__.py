"""Benchmarks behind the README's figures. They are slow or noisy, so they are commands rather than tests."""
