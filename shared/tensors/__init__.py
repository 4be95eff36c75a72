"""Tensors by reference: events carry a ``TensorRef``, the reader takes the cheapest way that its place allows."""
