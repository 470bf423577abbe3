"""Packed layers: their weight, their modules, their report."""
