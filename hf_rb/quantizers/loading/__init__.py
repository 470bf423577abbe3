"""How transformers loads a model with packed layers."""
