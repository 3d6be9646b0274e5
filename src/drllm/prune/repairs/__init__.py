"""Repairs: ways to make up for the layers that a model leaves out, each in a file of its own."""
