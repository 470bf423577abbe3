"""Loading of a model with packed layers by transformers."""
